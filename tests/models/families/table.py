"""The table of docs/models.md: the largest difference of logits from transformers', by family.

python tests/models/families/table.py --write
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import fastattn
from fastattn.models.families import FAMILIES

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"


def versions() -> str:
    return f"transformers {transformers.__version__}"


@torch.no_grad()
def difference(original: Any) -> tuple[float, float]:
    """The largest difference of logits in float32 on 66 random tokens, and the largest logit.

    An encoder-decoder reads as many before.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 97, (2, 33), generator=generator)]
    if original.config.is_encoder_decoder:
        tokens.append(torch.randint(3, 97, (2, 33), generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        ours = fastattn.models.load(folder)
    names = ("input_ids", "decoder_input_ids")
    theirs = original(**dict(zip(names, tokens, strict=False))).logits
    return (ours(*tokens) - theirs).abs().max().item(), theirs.abs().max().item()


@torch.no_grad()
def encoder_difference(name: str) -> tuple[str, float, float]:
    """The model_type of an encoder, and the same of the logits of its masked tokens, with padding."""
    from models.encoders import make_pair, padded

    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        ours, original = make_pair(Path(folder), name, "ForMaskedLM")
    batch = padded(original.config, "right")
    seen = batch["attention_mask"].bool()
    theirs = original(**batch).logits[seen]
    apart = (ours(**batch).logits[seen] - theirs).abs().max().item()
    return original.config.model_type, apart, theirs.abs().max().item()


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from models.encoders import FAMILIES as ENCODERS
    from models.families import cases, encoder_decoder_cases

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    worst: dict[str, tuple[int, float, float]] = {}
    found = [
        (kind, *difference(room.theirs(name)))
        for room in (cases, encoder_decoder_cases)
        for name, (kind, _) in room.CASES.items()
    ]
    for kind, apart, logit in found + [encoder_difference(name) for name in ENCODERS]:
        count, most, largest = worst.get(kind, (0, 0.0, 0.0))
        worst[kind] = count + 1, max(most, apart), max(largest, logit)
    lines = [
        f"Random small models in float32, with {versions()}, on a CPU:\n",
        "| family | `model_type` | configurations | largest difference | largest logit |",
        "|---|---|---|---|---|",
        *(
            f"| {FAMILIES[kind].title} | `{kind}` | {count} | {most:.0e} | {largest:.0f} |"
            for kind, (count, most, largest) in worst.items()
        ),
    ]
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = text[:begin] + "\n".join(lines) + "\n" + text[end:]
    if "--write" in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    print("\n".join(lines))
    return int(new != text)


if __name__ == "__main__":
    sys.exit(main())
