"""Norms over the last dimension: no children, one or two vectors, a small number for eps.

    LayerNorm   (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    RMSNorm     x / sqrt(mean(x^2) + eps) * weight

The factor is the weight, or 1 + the weight.

Norms of the hidden state and of the heads of q and k are the same to it. Models compute them in
different precisions and round in different places; ours compute in float32 and round once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastattn.backends import explanation_of
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.ops.layer_norm import layer_norm, rms_norm

# Where a class keeps none: its forward has it in the code.
COMMON_EPS = (1e-6, 1e-5, 1e-12, 1e-8)
MAX_EPS = 1e-2
DEFAULT_WIDTH = 24  # of the proof's inputs, where no weight tells one


@dataclass(frozen=True)
class Norm:
    """A norm and where a module keeps what belongs to it: names of attributes.

    Attributes:
        centered: LayerNorm, which subtracts the mean; RMSNorm does not.
        offset: added to the weight: 0 or 1.
        eps: a name, or the number itself.
    """

    centered: bool
    weight: str | None
    bias: str | None
    offset: int
    eps: str | float

    def __str__(self) -> str:
        parts = ["LayerNorm" if self.centered else "RMSNorm"]
        if self.weight is None:
            parts.append("without weight")
        if self.offset:
            parts.append(f"with weight {self.offset} + {self.weight}")
        if isinstance(self.eps, float):
            parts.append(f"with eps {self.eps:g}")
        return " ".join(parts)

    def __call__(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        function, args = self.call(module, x)
        out: torch.Tensor = function(*args)
        return out if out.dtype is x.dtype else out.to(x.dtype)  # autocast answers in float32

    def call(self, module: Any, x: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        """Our function, and its arguments."""
        weight = None if self.weight is None else getattr(module, self.weight)
        if weight is not None and self.offset:
            weight = weight.float() + self.offset  # 1 + a small weight needs the digits
        eps = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        if not self.centered:
            return rms_norm, (x, weight, eps)
        bias = None if self.bias is None else getattr(module, self.bias)
        return layer_norm, (x, weight, bias, eps)

    def of_heads(self, module: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """The weight and the other arguments of `rotary` for it, an RMSNorm with a weight."""
        assert self.weight is not None and not self.centered
        eps = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        return getattr(module, self.weight), {"eps": eps, "weight_offset": float(self.offset)}


class NormSwap(torch.nn.Module):
    """Runs a module on the norm that its class is taken for.

    Calls of another form (a gate, a residual, inputs of another dtype than the weight) and weights
    of a tensor subclass run the original.
    """

    _fastattn_bound: ClassVar[Norm]

    @staticmethod
    def recogniser(bound: Norm) -> Recogniser:
        return recogniser(bound)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._suits(args[0]):
            return self._fastattn_bound(self, args[0])
        return super().forward(*args, **kwargs)

    def _suits(self, x: Any) -> bool:
        if not isinstance(x, torch.Tensor):
            return False
        return all(
            p is None or (p.dtype is x.dtype and type(p) in (torch.nn.Parameter, torch.Tensor))
            for p in self._parameters.values()
        )


def recogniser(norm: Norm) -> Recogniser:
    def backend(module: torch.nn.Module, probe: Probe) -> str | None:
        function, args = norm.call(module, probe.args[0])
        return explanation_of(function, *args).backend

    def probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
        width = _width(module) or DEFAULT_WIDTH
        return [
            Probe((draw.normal(3, 5, width) + 4.0,)),  # a mean that is not 0
            Probe((draw.normal(7, width) * 1e-3,)),  # where eps counts
            Probe((draw.normal(2, 3, 5, width),)),  # heads
        ]

    return Recogniser(
        words=str(norm),
        mixin=NormSwap,
        probes=probes,
        backend=backend,
        bound=norm,
    )


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    yield from map(recogniser, norms_of(module))


def norms_of(module: torch.nn.Module) -> Iterator[Norm]:
    """Those that a module may be, by what it contains."""
    vectors = {name: p for name, p in module._parameters.items() if p is not None}
    if module._modules or module._buffers or len(vectors) > 2:
        return
    if any(p.dim() != 1 or len(p) < 2 for p in vectors.values()):
        return
    if len({len(p) for p in vectors.values()}) > 1:
        return
    kept = [n for n, v in vars(module).items() if type(v) is float and 0 <= v <= MAX_EPS]
    if not vectors and not (any("eps" in name for name in kept) or _width(module)):
        return
    epsilons: list[str | float] = [*kept] if kept else [*COMMON_EPS]
    first, *others = [*vectors, None]
    orders = [(first, None)] if len(vectors) < 2 else [(first, others[0]), (others[0], first)]
    kinds = itertools.product(orders, epsilons, (False, True), (0, 1))
    for (weight, bias), eps, centered, offset in kinds:
        if (centered or bias is None) and (weight is not None or not offset):
            yield Norm(centered, weight, bias, offset, eps)


def _width(module: torch.nn.Module) -> int | None:
    """The length of the normalised dimension, where the module tells."""
    for vector in module._parameters.values():
        if vector is not None:
            return len(vector)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 1:
        return int(shape[0])
    return shape if isinstance(shape, int) else None
