"""ffn on one device: fastattn against eager PyTorch and the bare matrix products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import peers
import torch
from harness import Cell
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FeedForwardCell(Cell):
    """gelu(x w1 + b1) w2 + b2 with GELU by tanh, of (rows, hidden), inner units between."""

    rows: int
    hidden: int
    inner: int
    layout: str

    @property
    def axes(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("rows", "hidden", "inner", "layout")}

    @property
    def flops(self) -> float:
        return 4.0 * self.rows * self.hidden * self.inner * (2 if self.backward else 1)

    def inputs(self) -> tuple[Tensor, ...]:
        options = {"device": self.device, "dtype": self.torch_dtype}
        x = torch.randn(self.rows, self.hidden, **options)
        w1 = torch.randn(self.inner, self.hidden, **options) / math.sqrt(self.hidden)
        w2 = torch.randn(self.hidden, self.inner, **options) / math.sqrt(self.inner)
        b1, b2 = torch.randn(self.inner, **options), torch.randn(self.hidden, **options)
        if self.layout == "conv1d":
            w1, w2 = w1.t().contiguous(), w2.t().contiguous()
        return x, w1, b1, w2, b2

    def definition(self, *inputs: Tensor) -> peers.Outputs:
        return peers.ffn_eager(self).function(*inputs)


SHAPES = (
    # rows, hidden, inner, layout
    (8192, 768, 3072, "linear"),
    (8192, 768, 3072, "conv1d"),
    (8192, 4096, 16384, "linear"),
    (16, 768, 3072, "conv1d"),
    (1023, 1000, 4001, "linear"),
)


TINY = ((9, 16, 40, "linear"), (9, 16, 40, "conv1d"))


def cells(device: str) -> Iterator[FeedForwardCell]:
    """What `gpu_check` measures, the most telling first."""
    return _cells(device, SHAPES if device == "cuda" else TINY, peers.FFN)


def compiled_cells(device: str) -> Iterator[FeedForwardCell]:
    """Those that are measured against torch.compile of the eager op."""
    return _cells(device, (SHAPES if device == "cuda" else TINY)[:1], peers.FFN_COMPILED)


def _cells(
    device: str,
    shapes: Sequence[tuple[int, int, int, str]],
    against: Mapping[str, Callable[..., peers.Peer]],
) -> Iterator[FeedForwardCell]:
    for (rows, hidden, inner, layout), backward in itertools.product(shapes, (False, True)):
        yield FeedForwardCell(
            op="ffn",
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            backward=backward,
            against=against,
            rows=rows,
            hidden=hidden,
            inner=inner,
            layout=layout,
        )
