"""rotary: fastattn against the formula in eager PyTorch, torch.compile and Liger.

q and k of (batch, seqlen, heads, head_dim), with the angles of every element of a head, as
transformers' `position_embeddings` have them. `--norms yes` has an RMSNorm of each head before, as
Qwen 3's. It moves memory: rates are in bytes, and the ceiling is a copy of q and k in the same run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import torch
from harness import BACKWARD, FORWARD, OURS, Cell
from peer import Outputs, Peer, Refused, imported, with_compiled
from script import COMPILE, DIRECTION, DTYPE, Axis, Subject, boolean, grids, main
from torch import Tensor
from torch.nn import functional as F

import fastattn

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class RotaryCell(Cell):
    """q and k turned, halves of a head against each other, after a norm of each head or not."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    norms: bool

    sizes = ("batch", "seqlen", "heads", "kv_heads", "head_dim", "norms")
    bound = "copy"

    @property
    def elements(self) -> int:
        return self.batch * self.seqlen * (self.heads + self.kv_heads) * self.head_dim

    @property
    def bytes(self) -> float:
        """q and k are read and written; backward their gradients, a norm's inputs too."""
        passes = {FORWARD: 2, BACKWARD: 2 + self.norms}.get(self.direction, 4 + self.norms)
        return float(passes * self.elements * self.torch_dtype.itemsize)

    @property
    def outputs(self) -> int:
        return 2

    def inputs(self) -> tuple[Tensor, ...]:
        heads = (self.heads, self.kv_heads)
        q, k = (self.randn(self.batch, self.seqlen, n, self.head_dim) for n in heads)
        return (q, k, *(self.randn(self.head_dim) for _ in "qk")) if self.norms else (q, k)

    def gradients(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.randn_like(x) for x in inputs[:2])

    def angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin, (1, seqlen, head_dim), in the cell's dtype."""
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64) / (self.head_dim // 2)
        angles = torch.outer(torch.arange(self.seqlen, dtype=torch.float64), 10000.0**-pairs)
        angles = torch.cat((angles, angles), -1)[None]
        cos, sin = (x.to(self.device, self.torch_dtype) for x in (angles.cos(), angles.sin()))
        return cos, sin

    def definition(self, *inputs: Tensor) -> Outputs:
        return eager(self, inputs[0].dtype).function(*inputs)


# --- peers ----------------------------------------------------------------------------------------


def ours(cell: RotaryCell) -> Peer:
    cos, sin = cell.angles()
    if not cell.norms:
        return Peer(lambda q, k: fastattn.rotary(q, k, cos, sin))

    def call(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Outputs:
        return fastattn.rotary(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=EPS)

    return Peer(call)


def eager(cell: RotaryCell, dtype: torch.dtype | None = None) -> Peer:
    """As transformers' apply_rotary_pos_emb has it, after its norms; angles in `dtype`."""
    cos, sin = (x.to(dtype or x.dtype).unsqueeze(2) for x in cell.angles())

    def turned(x: Tensor, *weight: Tensor) -> Tensor:
        if weight:
            x = F.rms_norm(x, (cell.head_dim,), weight[0], EPS)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def call(q: Tensor, k: Tensor, *weights: Tensor) -> Outputs:
        return turned(q, *weights[:1]), turned(k, *weights[1:])

    return Peer(call)


def liger(cell: RotaryCell) -> Peer:
    functional = imported("liger_kernel.transformers.functional", "Liger-Kernel", gpu=cell)
    if cell.norms:
        raise Refused("its rotary embedding has no norm")
    cos, sin = cell.angles()

    def call(q: Tensor, k: Tensor) -> Outputs:
        # It turns q and k in place where they are contiguous.
        q, k = functional.liger_rope(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return Peer(call)


def copy(cell: RotaryCell) -> Peer:
    """A copy of q and k: it reads and writes their bytes once each."""
    moved = 2.0 * cell.elements * cell.torch_dtype.itemsize
    return Peer(lambda q, k, *_: (q.clone(), k.clone()), ceiling=True, bytes=moved)


PEERS = {OURS: ours, "copy": copy, "eager": eager, "liger": liger}


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "batch": Axis("sequences"),
    "seqlen": Axis("tokens of each"),
    "heads": Axis("of q"),
    "kv_heads": Axis("of k"),
    "head_dim": Axis("of q and k"),
    "norms": Axis("an RMSNorm of each head before", kind=boolean),
    "direction": DIRECTION,
    "dtype": DTYPE,
    "compile": COMPILE,
}


def make(*, compile: bool, **same: Any) -> RotaryCell:
    """The cell of one value for each axis."""
    against = with_compiled(PEERS, compile)
    return RotaryCell(op="rotary", compile=compile, against=against, **same)


grid = grids(
    dtype=["bfloat16"], batch=[4], seqlen=[4096], heads=[32], kv_heads=[8], head_dim=[128],
    norms=[False, True], direction=[FORWARD, BACKWARD], compile=[False],
)  # fmt: skip
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"], "heads": [9], "kv_heads": [3]}
PRESETS = {
    ("cuda", "quick"): [
        grid(),
        grid(batch=[1], seqlen=[1], norms=[False], direction=[FORWARD]),
        grid(head_dim=[80], seqlen=[1023], norms=[False]),
        grid(head_dim=[64], compile=[True]),
    ],
    ("cuda", "full"): [
        grid(head_dim=[64, 80, 128, 256], compile=[True]),
        grid(seqlen=[1, 128, 1024], batch=[1, 8]),
        grid(dtype=["float16", "float32"]),
    ],
    ("cuda", "paper"): [grid(seqlen=[4096, 16384], compile=[True])],
    ("cpu", "quick"): [
        grid(**CPU, batch=[1], seqlen=[1, 512], head_dim=[64]),
    ],
    ("cpu", "full"): [
        grid(**CPU, batch=[1], seqlen=[1, 33, 512], head_dim=[64, 128]),
        grid(dtype=["bfloat16"], batch=[1], seqlen=[128], heads=[9], kv_heads=[3], head_dim=[64]),
    ],
}
SUBJECT = Subject("rotary", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
