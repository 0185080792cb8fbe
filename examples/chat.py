"""Dialogue: a small GPT is pre-trained, then learns to answer from questions with answers.

    pip install "fastattn[examples]"
    python examples/chat.py runs/chat

Pre-training is on the texts that fastattn ships, fine-tuning on 2,500 short English and Chinese
dialogues; the loss is of the answers only. A model of this size answers the questions that it has
read, and shows that the parts fit together; `fastattn chat FOLDER` talks to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import corpora
from steps import CONFIGS, arguments, fastattn

from fastattn.files import write_text
from fastattn.training import Tokenizer, load_corpus
from fastattn.training.objectives import Chat


def main(argv: Sequence[str] | None = None) -> int:
    asked = arguments(__doc__ or "", argv)
    out, small = asked.folder, asked.small
    for name, text in load_corpus().items():
        write_text(out / "texts" / f"{name}.txt", text[:20_000] if small else text)
    rows = corpora.extract("dialogues") if small else corpora.dialogues()
    held_out = len(rows) // 20
    test = corpora.write(rows[:held_out], out / "test.jsonl")
    train = corpora.write(rows[held_out:], out / "train.jsonl")
    less = ["training.steps=10", "training.warmup_steps=2"] if small else []

    # The tokenizer has the tokens of a dialogue's turns from the start.
    texts = list(load_corpus().values())
    texts += [str(message["content"]) for row in rows for message in row["messages"]]
    tokenizer = Tokenizer.train(texts, 400 if small else 2000, extra_tokens=Chat.extra_tokens)
    tokenizer.save(out / "tokenizer")

    pretrained, tuned = out / "pretrained", out / "tuned"
    fastattn(
        "train",
        CONFIGS / "pretrain_chat.toml",
        f"data.training={out / 'texts'}",
        f"tokenizer.folder={out / 'tokenizer'}",
        f"output.folder={pretrained}",
        *less,
    )
    fastattn(
        "train",
        CONFIGS / "chat.toml",
        f"model.folder={pretrained / 'model'}",
        f"data.training={train}",
        f"data.validation={test}",
        f"output.folder={tuned}",
        *less,
    )
    questions = [row["messages"][0]["content"] for row in rows if len(row["messages"]) == 2]
    fastattn("chat", tuned / "model", "--max-new-tokens", 24, lines=questions[-5:])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
