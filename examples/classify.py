"""Chinese sentiment: does pre-training on reviews without labels help to classify others?

    pip install "fastattn[examples]"
    python examples/classify.py runs/classify

An encoder is pre-trained by masked LM on 16,000 reviews; that encoder, and one with new weights,
then learn from 500 labelled reviews, three times each, with other seeds. Printed is the accuracy
on 1,000 reviews that neither has seen. At the end a text is classified.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import corpora
from steps import CONFIGS, arguments, fastattn, scores

from fastattn.files import write_text
from fastattn.training.runs import toml

SEEDS = 0, 1, 2
TEXT = "我喜欢编程"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print both accuracies; 1 if pre-training did not help (a trial is not judged)."""
    asked = arguments(__doc__ or "", argv)
    out, small = asked.folder, asked.small
    rows = corpora.extract("reviews") if small else corpora.reviews()
    held_out, labelled = (100, 60) if small else (1000, 500)
    test = corpora.write(rows[:held_out], out / "test.jsonl")
    train = corpora.write(rows[held_out : held_out + labelled], out / "labelled.jsonl")
    texts = [{"text": row["text"]} for row in rows[held_out:]]
    unlabelled = corpora.write(texts, out / "unlabelled.jsonl")

    pretrain, classify = CONFIGS / "pretrain_reviews.toml", CONFIGS / "classify_reviews.toml"
    less = ["training.steps=10", "training.warmup_steps=2"] if small else []
    size = ["tokenizer.vocab_size=400"] if small else []
    pretrained = out / "pretrained"
    fastattn(
        "train",
        pretrain,
        f"data.training={unlabelled}",
        f"output.folder={pretrained}",
        *less,
        *size,
    )
    scratch = out / "scratch.toml"  # the same encoder, with new weights
    tables = toml.read(classify) | {"model": toml.read(pretrain)["model"]}
    write_text(scratch, toml.written(tables))

    accuracies: dict[str, list[float]] = {}
    for name, config, start in (
        ("scratch", scratch, [f"tokenizer.folder={pretrained / 'tokenizer'}"]),
        ("pretrained", classify, [f"model.folder={pretrained / 'model'}"]),
    ):
        for seed in SEEDS[:1] if small else SEEDS:
            run = out / f"{name}-{seed}"
            data = [f"data.training={train}", f"data.validation={test}"]
            fastattn(
                "train",
                config,
                *start,
                *data,
                f"training.seed={seed}",
                f"output.folder={run}",
                *less,
            )
            accuracies.setdefault(name, []).append(scores(run / "model", test)["accuracy"])

    fastattn("classify", out / "pretrained-0" / "model", TEXT)
    print(f"\naccuracy on {held_out} held-out reviews, after {labelled} labelled ones:")
    means = {name: statistics.mean(values) for name, values in accuracies.items()}
    for name, values in accuracies.items():
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"  {name:10} {means[name]:.3f}  (seeds: {each})")
    return 0 if small or means["pretrained"] > means["scratch"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
