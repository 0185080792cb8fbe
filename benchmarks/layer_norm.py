"""layer_norm and rms_norm on one device: fastattn against eager PyTorch and a plain copy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import peers
import torch
from harness import Cell
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NormCell(Cell):
    """A norm over the last dimension of (rows, hidden), with weight and, if it has one, bias."""

    rows: int
    hidden: int
    residual: bool

    @property
    def axes(self) -> dict[str, object]:
        return {"rows": self.rows, "hidden": self.hidden, "residual": self.residual}

    @property
    def bytes(self) -> float:
        """Forward x and y, backward x and both gradients; a residual adds one each way, and two."""
        tensors = 2 + self.backward + self.residual * (1 if self.backward else 2)
        return float(tensors * self.rows * self.hidden * self.torch_dtype.itemsize)

    @property
    def outputs(self) -> int:
        return 2 if self.residual else 1

    def inputs(self) -> tuple[Tensor, ...]:
        options = {"device": self.device, "dtype": self.torch_dtype}
        x, r = (torch.randn(self.rows, self.hidden, **options) for _ in range(2))
        weight, bias = (torch.randn(self.hidden, **options) for _ in range(2))
        if self.op == "rms_norm":
            return x, weight
        return (x, weight, bias, r) if self.residual else (x, weight, bias)

    def definition(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, r: Tensor | None = None
    ) -> peers.Outputs:
        if self.op == "rms_norm":
            return x * (x.square().mean(-1, keepdim=True) + peers.NORM_EPS).rsqrt() * weight
        total = x if r is None else x + r
        centred = total - total.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        out = centred * (variance + peers.NORM_EPS).rsqrt() * weight + bias
        return out if r is None else (out, total)


SHAPES = (
    # rows, hidden
    (16384, 4096),
    (16384, 1024),
    (32768, 768),
    (4096, 16384),
    (512, 768),
    (4097, 1023),
)
KINDS = (
    # op, residual
    ("layer_norm", False),
    ("rms_norm", False),
    ("layer_norm", True),
)


def cells(device: str) -> Iterator[NormCell]:
    """What `gpu_check` measures, the most telling first."""
    return _cells(device, SHAPES if device == "cuda" else ((5, 33), (16, 64)), peers.NORM)


def compiled_cells(device: str) -> Iterator[NormCell]:
    """Those that are measured against torch.compile of the eager op."""
    return _cells(device, SHAPES[:1] if device == "cuda" else ((5, 33),), peers.NORM_COMPILED)


def _cells(
    device: str,
    shapes: Sequence[tuple[int, int]],
    against: Mapping[str, Callable[..., peers.Peer]],
) -> Iterator[NormCell]:
    for (rows, hidden), (op, residual), backward in itertools.product(shapes, KINDS, (False, True)):
        yield NormCell(
            op=op,
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            backward=backward,
            against=against,
            rows=rows,
            hidden=hidden,
            residual=residual,
        )
