"""layer_norm and rms_norm: fastattn against eager PyTorch, torch.compile and other packages.

Norms move memory and do little else: rates are in bytes, and the ceiling is a copy of x in the same
run. `--residual yes` adds a residual first and returns the sum too, as a transformer's block wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
from harness import BACKWARD, FORWARD, OURS, Cell
from peer import Outputs, Peer, Refused, first, imported, with_compiled
from script import COMPILE, DIRECTION, DTYPE, Axis, Subject, boolean, grids, main
from torch import Tensor
from torch.nn import functional as F

import fastattn

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class NormCell(Cell):
    """A norm over the last dimension of (rows, hidden), with weight and, if it has one, bias."""

    rows: int
    hidden: int
    residual: bool

    sizes = ("rows", "hidden", "residual")
    bound = "copy"

    @property
    def bytes(self) -> float:
        """Forward x and y, backward x and both gradients; a residual adds two, and one."""
        forward, backward = 2 + 2 * self.residual, 3 + self.residual
        tensors = {FORWARD: forward, BACKWARD: backward}.get(self.direction, forward + backward)
        return float(tensors * self.rows * self.hidden * self.torch_dtype.itemsize)

    @property
    def outputs(self) -> int:
        return 2 if self.residual else 1

    def inputs(self) -> tuple[Tensor, ...]:
        x, r = (self.randn(self.rows, self.hidden) for _ in range(2))
        weight, bias = (self.randn(self.hidden) for _ in range(2))
        if self.op == "rms_norm":
            return x, weight
        return (x, weight, bias, r) if self.residual else (x, weight, bias)

    def definition(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, r: Tensor | None = None
    ) -> Outputs:
        if self.op == "rms_norm":
            return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
        total = x if r is None else x + r
        centred = total - total.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        out = centred * (variance + EPS).rsqrt() * weight + bias
        return out if r is None else (out, total)

    def plain(self, *inputs: Tensor) -> Outputs:
        return eager(self).function(*inputs)


# --- peers ----------------------------------------------------------------------------------------


def ours(cell: NormCell) -> Peer:
    if cell.op == "rms_norm":
        return Peer(lambda x, w: fastattn.rms_norm(x, w, EPS))
    if cell.residual:
        return Peer(lambda x, w, b, r: fastattn.layer_norm(x, w, b, residual=r))
    return Peer(lambda x, w, b: fastattn.layer_norm(x, w, b))


def eager(cell: NormCell) -> Peer:
    shape = (cell.hidden,)
    if cell.op == "rms_norm":
        return Peer(lambda x, w: F.rms_norm(x, shape, w, EPS))
    if not cell.residual:
        return Peer(lambda x, w, b: F.layer_norm(x, shape, w, b))

    def with_residual(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Outputs:
        total = x + r
        return F.layer_norm(total, shape, w, b), total

    return Peer(with_residual)


def liger(cell: NormCell) -> Peer:
    functional = imported("liger_kernel.transformers.functional", "Liger-Kernel", gpu=cell)
    if cell.residual:
        raise Refused("its LayerNorm takes no residual")
    if cell.op == "rms_norm":
        return Peer(lambda x, w: functional.liger_rms_norm(x, w, EPS))
    return Peer(lambda x, w, b: functional.liger_layer_norm(x, w, b, EPS))


def quack(cell: NormCell) -> Peer:
    function = imported("quack", "quack", gpu=cell).rmsnorm
    if cell.op != "rms_norm":
        raise Refused("quack's LayerNorm has no backward and no bias")
    return Peer(lambda x, w: first(function(x, w, eps=EPS)))


def copy(cell: NormCell) -> Peer:
    """A copy of x: it reads and writes the bytes of x once each."""
    moved = 2.0 * cell.rows * cell.hidden * cell.torch_dtype.itemsize
    return Peer(lambda x, *_: x.clone(), ceiling=True, bytes=moved)


PEERS = {OURS: ours, "copy": copy, "eager": eager, "liger": liger, "quack": quack}


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "op": Axis("which norm", kind=str, choices=("layer_norm", "rms_norm")),
    "rows": Axis("tokens"),
    "hidden": Axis("of a row"),
    "residual": Axis("add one first; only layer_norm", kind=boolean),
    "direction": DIRECTION,
    "dtype": DTYPE,
    "compile": COMPILE,
}


def make(*, op: str, residual: bool, compile: bool, **same: Any) -> NormCell | None:
    """The cell of one value for each axis; None for an rms_norm with a residual."""
    if op == "rms_norm" and residual:
        return None
    against = with_compiled(PEERS, compile)
    return NormCell(op=op, residual=residual, compile=compile, against=against, **same)


grid = grids(
    dtype=["bfloat16"], rows=[16384], hidden=[4096], residual=[False, True],
    op=["layer_norm", "rms_norm"], direction=[FORWARD, BACKWARD], compile=[False],
)  # fmt: skip
WIDTHS = (768, 1024, 2048, 4096, 8192, 16384)
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"]}
PRESETS = {
    ("cuda", "quick"): [
        grid(),
        grid(rows=[32768], hidden=[768]),
        grid(rows=[512], hidden=[768], op=["layer_norm"]),
        grid(rows=[4097], hidden=[1023], op=["layer_norm"]),
        grid(op=["layer_norm"], compile=[True], hidden=[1024]),
    ],
    ("cuda", "full"): [
        grid(hidden=WIDTHS, compile=[True]),
        grid(hidden=[768, 4096], rows=[1, 64, 512, 4096]),
        grid(hidden=[1000, 1023, 50257], rows=[4096]),
        grid(hidden=[4096], dtype=["float16", "float32"]),
    ],
    ("cuda", "paper"): [grid(rows=[32768], hidden=[4096, 8192, 16384, 32768, 65536])],
    ("cpu", "quick"): [
        grid(**CPU, rows=[64, 512, 4096], hidden=[768], op=["layer_norm"]),
        grid(**CPU, rows=[512], hidden=[1023, 4096], residual=[False]),
    ],
    ("cpu", "full"): [
        grid(**CPU, rows=[1, 64, 512, 4096], hidden=[768, 1024, 4096]),
        grid(dtype=["bfloat16"], rows=[512], hidden=[768, 1023]),
    ],
}
SUBJECT = Subject("layer_norm", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
