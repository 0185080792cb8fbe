"""layer_norm and rms_norm: fastattn against eager PyTorch, torch.compile and other packages.

Norms move memory and do little else: rates are in bytes, and the ceiling is a copy of x in the same
run. `--residual yes` adds a residual first and returns the sum too, as a transformer's block wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import peers
import torch
from harness import BACKWARD, DIRECTIONS, FORWARD, Cell
from script import Axis, Grid, Subject, boolean, main
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NormCell(Cell):
    """A norm over the last dimension of (rows, hidden), with weight and, if it has one, bias."""

    rows: int
    hidden: int
    residual: bool
    compile: bool = False

    bound = "copy"

    @property
    def axes(self) -> dict[str, Any]:
        axes = {"rows": self.rows, "hidden": self.hidden, "residual": self.residual}
        return axes | ({"compile": True} if self.compile else {})

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
        options: dict[str, Any] = {"device": self.device, "dtype": self.torch_dtype}
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

    def plain(self, *inputs: Tensor) -> peers.Outputs:
        return peers.norm_eager(self).function(*inputs)


AXES: Mapping[str, Axis] = {
    "op": Axis("which norm", kind=str, choices=("layer_norm", "rms_norm")),
    "rows": Axis("tokens"),
    "hidden": Axis("of a row"),
    "residual": Axis("add one first; layer_norm alone", kind=boolean),
    "direction": Axis("what is timed", kind=str, choices=DIRECTIONS),
    "dtype": Axis("of the tensors", kind=str, choices=("bfloat16", "float16", "float32")),
    "compile": Axis("have torch.compile take part; seconds to compile a row", kind=boolean),
}


def make(
    *,
    op: str,
    device: str,
    rows: int,
    hidden: int,
    residual: bool,
    direction: str,
    dtype: str,
    compile: bool,
) -> NormCell | None:
    """The cell of one value for each axis; None for an rms_norm with a residual."""
    if op == "rms_norm" and residual:
        return None
    return NormCell(
        op=op,
        device=device,
        dtype=dtype,
        direction=direction,
        against={**peers.NORM, **(peers.NORM_COMPILED if compile else {})},
        rows=rows,
        hidden=hidden,
        residual=residual,
        compile=compile,
    )


def grid(**axes: Sequence[Any]) -> Grid:
    """The axes named, the others at what is common."""
    common: dict[str, Sequence[Any]] = {
        "dtype": ["bfloat16"], "rows": [16384], "hidden": [4096], "residual": [False, True],
        "op": ["layer_norm", "rms_norm"], "direction": [FORWARD, BACKWARD], "compile": [False],
    }  # fmt: skip
    return {**axes, **{name: values for name, values in common.items() if name not in axes}}


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
