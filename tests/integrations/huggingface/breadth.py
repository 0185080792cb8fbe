"""`accelerate` on a small random model of every family: the table of docs/swap.md.

python tests/integrations/huggingface/breadth.py --write
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
import transformers

import fastattn

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "swap.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"
KINDS = {
    "norms": "Norm",
    "attentions": "Attention",
    "MLPs": "MLP|Mlp|FFN|DenseActDense|DenseGatedActDense|Intermediate",
}


def kind_of(name: str) -> str | None:
    """What a class is by its name: a measure of `accelerate`, which does not look at names."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


def counted(model: torch.nn.Module, report: fastattn.integrations.Report) -> dict[str, list[int]]:
    """{kind: [swapped, all]} of an accelerated model; wrappers of attentions are not counted."""
    swapped = {entry.name for entry in report.swapped}
    counts = {kind: [0, 0] for kind in KINDS}
    for name, module in model.named_modules():
        kind = kind_of(getattr(type(module), "_fastattn_original", type(module)).__name__)
        inner = (type(m).__name__ for m in module.modules() if m is not module)
        if kind and not (kind == "attentions" and any("Attention" in n for n in inner)):
            counts[kind][0] += name in swapped
            counts[kind][1] += 1
    return counts


def versions() -> str:
    return f"transformers {transformers.__version__}"


def row(family: str, counts: dict[str, list[int]]) -> str:
    cells = (f"{n} of {whole}" if whole else "-" for n, whole in counts.values())
    return f"| {family} | {' | '.join(cells)} |"


def total(rows: list[dict[str, list[int]]]) -> str:
    sums = {k: [sum(r[k][0] for r in rows), sum(r[k][1] for r in rows)] for k in KINDS}
    shares = (f"{n} of {whole}, {n / whole:.0%}" for n, whole in sums.values())
    return f"| all | {' | '.join(shares)} |"


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from integrations.huggingface.test_attention_families import FAMILIES, accelerated

    transformers.logging.set_verbosity_error()
    found = {family: counted(*accelerated(family, "cpu")) for family in FAMILIES}
    lines = [
        f"With {versions()}, on a CPU:\n",
        f"| family | {' | '.join(KINDS)} |",
        f"|---{'|---' * len(KINDS)}|",
        *(row(family, counts) for family, counts in found.items()),
        total(list(found.values())),
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
