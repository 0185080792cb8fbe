"""cross_entropy and linear_cross_entropy: fastattn against eager PyTorch, torch.compile and Liger.

The mean over `rows` tokens of `classes`. `cross_entropy` moves its logits: the ceiling is a copy of
them in the same run. `linear_cross_entropy` makes them from (rows, hidden): its ceiling is the bare
matrix products, one forward, three with the backward. Its backward is not timed alone: the forward
that has one result makes the gradients. Eager is what a model's head does: logits in the cell's
dtype, their loss in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import torch
from harness import BACKWARD, BOTH, FORWARD, OURS, Cell
from peer import Outputs, Peer, first, imported, with_compiled
from script import COMPILE, DIRECTION, DTYPE, Axis, Subject, grids, main
from torch import Tensor
from torch.nn import functional as F

import fastattn

LINEAR = "linear_cross_entropy"


@dataclass(frozen=True, kw_only=True)
class LossCell(Cell):
    """The mean loss of logits (rows, classes), or of x (rows, hidden) and a head's weight."""

    rows: int
    hidden: int
    classes: int

    @property
    def linear(self) -> bool:
        return self.op == LINEAR

    @property
    def bound(self) -> str:  # type: ignore[override]
        return "gemms" if self.linear else "copy"

    @property
    def sizes(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("rows", "classes", "hidden") if self.linear else ("rows", "classes")

    @property
    def flops(self) -> float | None:
        if not self.linear:
            return None
        products = 3 if self.backward else 1
        return 2.0 * products * self.rows * self.hidden * self.classes

    @property
    def bytes(self) -> float | None:
        """The logits once forward; backward they are read and their gradient is written."""
        if self.linear:
            return None
        passes = {FORWARD: 1, BACKWARD: 2}.get(self.direction, 3)
        return float(passes * self.rows * self.classes * self.torch_dtype.itemsize)

    def inputs(self) -> tuple[Tensor, ...]:
        if not self.linear:
            return (self.randn(self.rows, self.classes),)
        weight = self.randn(self.classes, self.hidden) / math.sqrt(self.hidden)
        return self.randn(self.rows, self.hidden), weight

    def gradients(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.rand((), device=self.device),)

    def targets(self) -> Tensor:
        """(rows,), the same ones every time."""
        draw = torch.Generator().manual_seed(0)
        return torch.randint(self.classes, (self.rows,), generator=draw).to(self.device)

    def definition(self, *inputs: Tensor) -> Outputs:
        return eager(self).function(*inputs)


# --- peers ----------------------------------------------------------------------------------------


def ours(cell: LossCell) -> Peer:
    targets = cell.targets()
    if cell.linear:
        return Peer(lambda x, w: fastattn.linear_cross_entropy(x, w, targets))
    return Peer(lambda logits: fastattn.cross_entropy(logits, targets))


def eager(cell: LossCell) -> Peer:
    targets = cell.targets()

    def loss(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets)

    return Peer((lambda x, w: loss(F.linear(x, w))) if cell.linear else loss)


def liger(cell: LossCell) -> Peer:
    functional = imported("liger_kernel.transformers.functional", "Liger-Kernel", gpu=cell)
    targets = cell.targets()
    if cell.linear:
        fused = functional.liger_fused_linear_cross_entropy
        return Peer(lambda x, w: first(fused(x, w, targets)))
    # It writes the gradient into the logits, which are to be there for the next call.
    return Peer(lambda logits: first(functional.liger_cross_entropy(logits.clone(), targets)))


def copy(cell: LossCell) -> Peer:
    """A copy of the logits: it reads and writes their bytes once each."""
    moved = 2.0 * cell.rows * cell.classes * cell.torch_dtype.itemsize
    return Peer(lambda logits: logits.clone(), ceiling=True, bytes=moved)


def gemms(cell: LossCell) -> Peer:
    """The bare matrix products of the direction."""

    def products(x: Tensor, w: Tensor) -> Outputs:
        logits = x @ w.t()
        return (logits, logits @ w, logits.t() @ x) if cell.backward else logits

    return Peer(products, ceiling=True)


PEERS = {OURS: ours, "eager": eager, "liger": liger}
CEILING = {True: {"gemms": gemms}, False: {"copy": copy}}


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "op": Axis("which of both", kind=str, choices=("cross_entropy", LINEAR)),
    "rows": Axis("tokens"),
    "hidden": Axis("of x; only linear_cross_entropy"),
    "classes": Axis("of the vocabulary"),
    "direction": DIRECTION,
    "dtype": DTYPE,
    "compile": COMPILE,
}


def make(*, op: str, direction: str, compile: bool, **same: Any) -> LossCell | None:
    """The cell of one value for each axis; None for a linear_cross_entropy's backward alone."""
    if op == LINEAR and direction == BACKWARD:
        return None
    against = with_compiled({**PEERS, **CEILING[op == LINEAR]}, compile)
    return LossCell(op=op, direction=direction, compile=compile, against=against, **same)


grid = grids(
    op=["cross_entropy", LINEAR], dtype=["bfloat16"], rows=[8192], hidden=[4096],
    classes=[131072], direction=[FORWARD, BOTH], compile=[False],
)  # fmt: skip
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"]}
PRESETS = {
    ("cuda", "quick"): [
        grid(op=[LINEAR]),
        grid(rows=[8192], hidden=[768], classes=[50257]),
        grid(rows=[1023], hidden=[1000], classes=[32003]),
        grid(op=[LINEAR], rows=[2048], hidden=[2048], compile=[True]),
    ],
    ("cuda", "full"): [
        grid(op=[LINEAR], hidden=[1024, 2048, 4096], compile=[True]),
        grid(op=["cross_entropy"], classes=[1000, 32000, 131072], direction=[FORWARD, BACKWARD]),
        grid(rows=[512, 2048, 16384], hidden=[2048], classes=[32000]),
        grid(dtype=["float16", "float32"], rows=[2048], hidden=[1024], classes=[50257]),
    ],
    ("cuda", "paper"): [grid(op=[LINEAR], rows=[8192, 32768], hidden=[2048, 4096, 8192])],
    ("cpu", "quick"): [
        grid(**CPU, rows=[32], hidden=[64], classes=[1000]),
        grid(**CPU, op=[LINEAR], rows=[256], hidden=[128], classes=[50257], direction=[BOTH]),
        grid(**CPU, op=["cross_entropy"], rows=[256], classes=[50257], direction=[BOTH]),
    ],
    ("cpu", "full"): [
        grid(**CPU, rows=[1, 32, 256], hidden=[128], classes=[1000, 50257]),
        grid(**CPU, op=["cross_entropy"], rows=[256], classes=[50257], direction=[BACKWARD]),
        grid(**CPU, op=[LINEAR], rows=[512], hidden=[768], classes=[50257], direction=[BOTH]),
        grid(op=[LINEAR], rows=[512], hidden=[128], classes=[32000], direction=[BOTH]),
    ],
}
SUBJECT = Subject("cross_entropy", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
