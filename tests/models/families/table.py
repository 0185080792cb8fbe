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
    """The largest difference of logits in float32 on 66 random tokens, and the largest logit."""
    tokens = torch.randint(3, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        ours = fastattn.models.load(folder)
    theirs = original(tokens).logits
    return (ours(tokens) - theirs).abs().max().item(), theirs.abs().max().item()


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from models.families.cases import CASES, theirs

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    worst: dict[str, tuple[int, float, float]] = {}
    for name, (kind, _) in CASES.items():
        count, most, largest = worst.get(kind, (0, 0.0, 0.0))
        apart, logit = difference(theirs(name))
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
