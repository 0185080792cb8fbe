"""English to Chinese: an encoder-decoder learns from the translations of user interfaces.

    pip install "fastattn[examples]"
    python examples/translate.py runs/translate

18,000 short texts of thirteen programs, as their gettext catalogues translate them. Printed are
BLEU and chrF on 500 that the model has not seen, of greedy decoding and of beam search, and some of
the translations beside those of the catalogues.
"""

from __future__ import annotations

from collections.abc import Sequence

import corpora
from steps import CONFIGS, arguments, fastattn, scores


def main(argv: Sequence[str] | None = None) -> int:
    asked = arguments(__doc__ or "", argv)
    out, small = asked.folder, asked.small
    rows = corpora.extract("translations") if small else corpora.translations()
    held_out = 50 if small else 500
    test = corpora.write(rows[:held_out], out / "test.jsonl")
    train = corpora.write(rows[held_out:], out / "train.jsonl")
    less = ["training.steps=10", "training.warmup_steps=2", "tokenizer.vocab_size=600"]
    fastattn(
        "train",
        CONFIGS / "translate.toml",
        f"data.training={train}",
        f"data.validation={test}",
        f"output.folder={out / 'run'}",
        *(less if small else []),
    )
    model = out / "run" / "model"
    length = ["--max-new-tokens", 8 if small else 64]
    for beams in (1, 4):
        scores(model, test, "--beams", beams, *length)
    fastattn("translate", model, *(row["source"] for row in rows[:6]), *length)
    print("\nas the catalogues have it:")
    for row in rows[:6]:
        print(f"  {row['source']}  ->  {row['target']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
