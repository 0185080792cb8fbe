"""`accelerate` on a small random model of every architecture: the table of docs/swap.md.

python tests/integrations/huggingface/breadth.py --write
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import fastattn

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "swap.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"
Counts = dict[str, list[int]]
KINDS = {
    "norms": r"Norm(?!ed)",
    "attentions": "Attention",
    "MLPs": "MLP|Mlp|FFN|FeedForward|DenseActDense|DenseGatedActDense|Intermediate",
}
# Linear layers that are the MLP of a layer without a module of its own.
WRITTEN_IN = (("fc1", "fc2"), ("ffn", "ffn_output"), ("linear1", "linear2"))


def kind_of(module: torch.nn.Module) -> str | None:
    """What a module is by its names: a measure of `accelerate`, which does not look at them."""
    name = original(module).__name__
    for kind, pattern in KINDS.items():
        if re.search(pattern, name):
            return kind
    children = dict(module.named_children())
    return "MLPs" if any(children.keys() >= {*pair} for pair in WRITTEN_IN) else None


def original(module: torch.nn.Module) -> type:
    return getattr(type(module), "_fastattn_original", type(module))


def counted(model: torch.nn.Module, report: fastattn.integrations.Report) -> Counts:
    """{kind: [swapped, all]} of an accelerated model; wrappers of others are not counted.

    A part of an MLP (BERT's intermediate layer) is swapped where the module that it is in is.
    """
    swapped = {model.get_submodule(entry.name) for entry in report.swapped}
    parts: set[torch.nn.Module] = set()
    for module in swapped:
        recogniser = type(module)._fastattn_recogniser
        parts.update(() if recogniser.whole else recogniser.fused(module))
    counts = {kind: [0, 0] for kind in KINDS}
    for module in model.modules():
        kind = kind_of(module)
        inner = {kind_of(part) for part in module.modules() if part is not module}
        if kind and (kind == "norms" or kind not in inner):
            whole = kind == "MLPs" and not parts.isdisjoint(module.children())
            counts[kind][0] += module in swapped or whole
            counts[kind][1] += 1
    return counts


def versions() -> str:
    return f"transformers {transformers.__version__}"


def row(name: str, counts: Counts) -> str:
    cells = (f"{n} of {whole}" if whole else "-" for n, whole in counts.values())
    return f"| {name} | {' | '.join(cells)} |"


def total(rows: list[Counts]) -> str:
    sums = {k: [sum(r[k][0] for r in rows), sum(r[k][1] for r in rows)] for k in KINDS}
    shares = (f"{n} of {whole}, {n / whole:.0%}" for n, whole in sums.values())
    return f"| all | {' | '.join(shares)} |"


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from integrations.huggingface.architectures import ARCHITECTURES, OTHERS, build

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    found = {}
    for name in (*ARCHITECTURES, *OTHERS):
        with contextlib.suppress(pytest.skip.Exception):  # not installed
            model = build(name, "cpu")
            found[name] = counted(model, fastattn.accelerate(model))
    lines = [
        f"{len(found)} architectures, with {versions()}, on a CPU:\n",
        f"| architecture | {' | '.join(KINDS)} |",
        f"|---{'|---' * len(KINDS)}|",
        *(row(name, counts) for name, counts in found.items()),
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
