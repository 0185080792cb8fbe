"""The timings of the GPU check, as lines of JSON: one for every cell begun and every row measured.

`gpu_check.py` runs this in a process of its own, so that a kernel that hangs or breaks the GPU's
context costs one row. By itself: `python benchmarks/gpu_parts.py --device cuda --parts ffn`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import attention
import attention_features
import ceilings
import ffn
import gpt
import layer_norm
from harness import DeviceLost, reason

REHEARSAL = 0.05  # seconds of timing a cell without a GPU

CellsOf = Callable[[str], Iterable[Any]]


@dataclass(frozen=True)
class Part:
    """Cells, the most telling first, and the seconds after which none is begun."""

    cells: CellsOf
    seconds: float


def compiled_cells(device: str) -> Iterable[Any]:
    subjects = (layer_norm, ffn, attention, gpt)
    return itertools.chain.from_iterable(s.compiled_cells(device) for s in subjects)


# In order of value: what does not fit into the time is at the end.
PARTS = {
    "ceilings": Part(ceilings.cells, 20),
    "attention": Part(attention.cells, 70),
    "decode": Part(attention_features.decode_cells, 15),
    "attention features": Part(attention_features.feature_cells, 40),
    "layer_norm": Part(layer_norm.cells, 35),
    "ffn": Part(ffn.cells, 25),
    "gpt training": Part(gpt.training_cells, 60),
    "gpt generation": Part(gpt.generation_cells, 60),
    "compiled": Part(compiled_cells, 80),
}


class Lines:
    """Events on what was standard output, which from now on is standard error to all others."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, **event: object) -> None:
        self._file.write(json.dumps(event) + "\n")


def run(part: str, device: str, end: float, skip: int, lines: Lines) -> None:
    """Measure the cells of a part until its time or `end` is reached, the first `skip` left out."""
    end = min(end, time.monotonic() + PARTS[part].seconds)
    cells = list(PARTS[part].cells(device))
    for cell in cells[skip:]:
        if time.monotonic() > end:
            lines.send(part=part, skipped=cell.title)
            continue
        lines.send(part=part, cell=cell.title, limit=cell.limit)
        start = time.monotonic()
        try:
            row = cell.measure() if device == "cuda" else cell.measure(seconds=REHEARSAL)
        except DeviceLost:
            raise
        except Exception as failure:
            row = {"title": cell.title, "error": reason(failure), "right": False}
        lines.send(part=part, row=row | {"seconds": round(time.monotonic() - start, 2)})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no cell after this")
    parser.add_argument("--skip", type=int, default=0, help="leave out cells of the first part")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    lines = Lines()
    for number, part in enumerate(arguments.parts):
        try:
            run(part, arguments.device, end, 0 if number else arguments.skip, lines)
        except DeviceLost as lost:
            print(f"the GPU's context is lost: {lost}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
