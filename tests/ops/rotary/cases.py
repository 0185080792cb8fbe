"""Problems of `rotary` for the tests: drawn from a seed, run on any backend, held to the rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ops import laws

import fastattn

Tensor = torch.Tensor
BACKENDS = ("reference", "torch", "triton")
ROWS = 23  # of a table


@dataclass
class Case:
    """One problem: what `check` draws and compares.

    `angles` is "tokens" (cos and sin of every token), "shared" (of every token of one sequence),
    "table" (in order), "positions" (batch, seqlen) or "one row of positions".
    """

    batch: int = 2
    seqlen: int = 5
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 16
    rotary_dim: int | None = None  # all of head_dim
    full: bool = False  # an angle for each element, and different ones in a pair
    interleaved: bool = False
    angles: str = "tokens"
    norms: str = ""  # of "q", "k", "qk"
    weight_offset: float = 0.0
    eps: float = 1e-6
    dtype: torch.dtype = torch.float32
    angle_dtype: torch.dtype | None = None  # dtype
    weight_dtype: torch.dtype | None = None  # dtype
    before: bool = False  # q and k lie as (batch, heads, seqlen, head_dim)
    device: str = "cpu"
    seed: int = 0

    @property
    def rotated(self) -> int:
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype or self.dtype).to(self.device)

        def heads(number: int) -> Tensor:
            if self.before:
                return normal(self.batch, number, self.seqlen, self.head_dim).transpose(1, 2)
            return normal(self.batch, self.seqlen, number, self.head_dim)

        tensors = {"q": heads(self.heads), "k": heads(self.kv_heads)}
        width = self.rotated if self.full else self.rotated // 2
        shape = {
            "tokens": (self.batch, self.seqlen, width),
            "shared": (1, self.seqlen, width),
        }.get(self.angles, (ROWS, width))
        angles = torch.randn(shape, generator=g) * 3
        dtype = self.angle_dtype or self.dtype
        tensors["cos"] = angles.cos().to(dtype).to(self.device)
        tensors["sin"] = angles.sin().to(dtype).to(self.device)
        if "positions" in self.angles:
            rows = self.batch if self.angles == "positions" else 1
            positions = torch.randint(0, ROWS, (rows, self.seqlen), generator=g)
            tensors["positions"] = positions.to(self.device)
        for name in self.norms:
            tensors[f"{name}_weight"] = normal(self.head_dim, dtype=self.weight_dtype)
        return tensors

    @property
    def options(self) -> dict[str, Any]:
        return {
            "rotary_dim": self.rotary_dim,
            "interleaved": self.interleaved,
            "eps": self.eps,
            "weight_offset": self.weight_offset,
        }

    def ours(self, backend: str | None, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return fastattn.rotary(**tensors, **self.options, backend=backend)

    def eager(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What transformers does: every step in the dtypes of the inputs, but the norm."""
        cos, sin = (tensors[name] for name in ("cos", "sin"))
        if "positions" in tensors:
            positions = tensors["positions"].long()
            positions = positions[None] if positions.dim() == 1 else positions
            cos, sin = (x[positions] for x in (cos, sin))
        elif cos.dim() == 2:
            cos, sin = (x[None, : self.seqlen] for x in (cos, sin))
        if not self.full:
            cos, sin = (self._twice(x) for x in (cos, sin))
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

        def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
            if weight is not None:
                y = x if x.dtype == torch.float64 else x.float()
                y = y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt()
                y = y * (weight.to(y) + self.weight_offset)
                x = y.to(x.dtype)
            turned, rest = x[..., : self.rotated], x[..., self.rotated :]
            turned = turned * cos + self._half_turned(turned) * sin
            return torch.cat((turned.to(x.dtype), rest), -1)

        return (
            rotated(tensors["q"], tensors.get("q_weight")),
            rotated(tensors["k"], tensors.get("k_weight")),
        )

    def _twice(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1) if self.interleaved else torch.cat((x, x), -1)

    def _half_turned(self, x: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)


def check(
    case: Case, backend: str | None, tensors: dict[str, Tensor] | None = None, wanted: str = "heads"
) -> dict[str, Tensor]:
    """Outputs, dtypes and gradients of `backend` under the rule; they are returned by name."""
    tensors = case.inputs() if tensors is None else tensors
    g = torch.Generator().manual_seed(case.seed + 1)
    cotangents = [
        torch.randn(tensors[name].shape, generator=g).to(case.dtype).to(case.device)
        for name in ("q", "k")
    ]
    fixed = {} if wanted == "all" else {name: tensors[name] for name in ("cos", "sin")}
    inputs = {name: x for name, x in tensors.items() if name not in fixed}

    def results(function: Any, inputs: dict[str, Tensor], fixed: dict[str, Tensor]) -> Any:
        names = "rotated q", "rotated k"
        return laws.results(lambda **t: function(t | fixed), inputs, *cotangents, names=names)

    ours = results(lambda t: case.ours(backend, t), inputs, fixed)
    exact = results(case.eager, laws.doubled(inputs), laws.doubled(fixed))
    return laws.held(ours, results(case.eager, inputs, fixed), exact, case)
