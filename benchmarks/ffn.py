"""ffn: fastattn against eager PyTorch, torch.compile and cuBLASLt's epilogue as ATen has it.

activation(x w1 + b1) w2 + b2 on (rows, hidden). The ceiling is the bare matrix products of the
direction in the same run: two forward, four more backward, without bias and activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import torch
from harness import BACKWARD, FORWARD, OURS, Cell
from peer import Outputs, Peer, Refused, on_a_gpu, with_compiled
from script import COMPILE, DIRECTION, DTYPE, Axis, Subject, grids, main
from torch import Tensor
from torch.nn import functional as F

import fastattn


@dataclass(frozen=True, kw_only=True)
class FeedForwardCell(Cell):
    """One feed-forward with `inner` units between."""

    rows: int
    hidden: int
    inner: int
    activation: str
    layout: str

    sizes = ("rows", "hidden", "inner", "activation", "layout")
    bound = "gemms"

    @property
    def flops(self) -> float:
        passes = {FORWARD: 1.0, BACKWARD: 2.0}.get(self.direction, 3.0)
        return 4.0 * self.rows * self.hidden * self.inner * passes

    def inputs(self) -> tuple[Tensor, ...]:
        x = self.randn(self.rows, self.hidden)
        w1 = self.randn(self.inner, self.hidden) / math.sqrt(self.hidden)
        w2 = self.randn(self.hidden, self.inner) / math.sqrt(self.inner)
        if self.layout == "conv1d":
            w1, w2 = w1.t().contiguous(), w2.t().contiguous()
        return x, w1, self.randn(self.inner), w2, self.randn(self.hidden)

    def definition(self, *inputs: Tensor) -> Outputs:
        return eager(self).function(*inputs)


# --- peers ----------------------------------------------------------------------------------------


def ours(cell: FeedForwardCell) -> Peer:
    return Peer(lambda *inputs: fastattn.ffn(*inputs, cell.activation, layout=cell.layout))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def eager(cell: FeedForwardCell) -> Peer:
    activation = ACTIVATIONS[cell.activation]

    def linear(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(activation(F.linear(x, w1, b1)), w2, b2)

    def conv1d(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.addmm(b2, activation(torch.addmm(b1, x, w1)), w2)

    return Peer(linear if cell.layout == "linear" else conv1d)


def epilogue(cell: FeedForwardCell) -> Peer:
    """ATen's product with bias and activation in cuBLASLt's epilogue; it has no backward."""
    if cell.backward:
        raise Refused("torch._addmm_activation has no backward")
    on_a_gpu(cell, "the epilogue of cuBLASLt")
    if cell.activation not in ("gelu_tanh", "relu"):
        raise Refused("the epilogue has GELU by tanh and ReLU")
    use_gelu = cell.activation == "gelu_tanh"

    def call(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        if cell.layout == "linear":
            w1, w2 = w1.t(), w2.t()
        h = torch._addmm_activation(b1, x, w1, use_gelu=use_gelu)
        return torch.addmm(b2, h, w2)

    return Peer(call)


def gemms(cell: FeedForwardCell) -> Peer:
    """The bare matrix products of the direction, without bias and activation."""

    def forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return x @ w1 @ w2

    def backward(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        h = x @ w2.t()  # x stands for the gradient of the output too: the shapes are the same
        return h @ w1.t(), x.t() @ h, h.t() @ x

    def gemms(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Outputs:
        if cell.layout == "linear":
            w1, w2 = w1.t(), w2.t()
        done: tuple[Tensor, ...] = ()
        if cell.direction != "backward":
            done += (forward(x, w1, w2),)
        if cell.backward:
            done += backward(x, w1, w2)
        return done

    return Peer(gemms, ceiling=True)


PEERS = {OURS: ours, "gemms": gemms, "eager": eager, "aten epilogue": epilogue}


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "rows": Axis("tokens"),
    "hidden": Axis("of x"),
    "inner": Axis("units between; 0: four times hidden"),
    "activation": Axis("between the products", kind=str, choices=tuple(ACTIVATIONS)),
    "layout": Axis("of the weights", kind=str, choices=("linear", "conv1d")),
    "direction": DIRECTION,
    "dtype": DTYPE,
    "compile": COMPILE,
}


def make(*, hidden: int, inner: int, compile: bool, **same: Any) -> FeedForwardCell:
    """The cell of one value for each axis."""
    against = with_compiled(PEERS, compile)
    inner = inner or 4 * hidden
    return FeedForwardCell(
        op="ffn", hidden=hidden, inner=inner, compile=compile, against=against, **same
    )


grid = grids(
    dtype=["bfloat16"], rows=[8192], hidden=[768], inner=[0], activation=["gelu_tanh"],
    layout=["linear"], direction=[FORWARD, BACKWARD], compile=[False],
)  # fmt: skip
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"]}
PRESETS = {
    ("cuda", "quick"): [
        grid(layout=["linear", "conv1d"]),
        grid(hidden=[4096]),
        grid(rows=[16], layout=["conv1d"]),
        grid(rows=[1023], hidden=[1000], inner=[4001]),
        grid(hidden=[1024], compile=[True]),
    ],
    ("cuda", "full"): [
        grid(hidden=[768, 1024, 2048, 4096], compile=[True]),
        grid(activation=["gelu", "relu", "silu"], hidden=[2048]),
        grid(rows=[1, 16, 128, 1024, 65536]),
        grid(hidden=[2048], layout=["conv1d"]),
        grid(dtype=["float16", "float32"], hidden=[1024]),
        grid(rows=[1023], hidden=[1000], inner=[4001]),
    ],
    ("cuda", "paper"): [grid(rows=[8192], hidden=[1024, 2048, 4096, 8192], compile=[True])],
    ("cpu", "quick"): [
        grid(**CPU, rows=[256], hidden=[768], layout=["linear", "conv1d"]),
        grid(**CPU, rows=[1, 33], hidden=[768], direction=[FORWARD]),
    ],
    ("cpu", "full"): [
        grid(**CPU, rows=[1, 16, 256, 1024], hidden=[768], layout=["linear", "conv1d"]),
        grid(**CPU, rows=[256], hidden=[256], activation=["gelu", "relu", "silu"]),
        grid(**CPU, rows=[33], hidden=[100], inner=[401]),
    ],
}
SUBJECT = Subject("ffn", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
