"""Problems of the norms for the tests: drawn from a seed, run on any backend, held to the rule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ops import laws

import fastattn
from fastattn.ops.common import dropout

Tensor = torch.Tensor
Norm = Callable[..., Tensor | tuple[Tensor, Tensor]]


@dataclass
class Case:
    """One problem: what `check` draws and compares."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    center: bool = True
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    residual: torch.dtype | None = None
    dropout_p: float = 0.0  # with a residual
    eps: float = 1e-5
    mean: float = 0.5  # of x
    device: str = "cpu"
    seed: int = 0

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.seed)

        def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype).to(self.device)

        hidden = self.shape[-1:]
        tensors = {"x": normal(self.shape, torch.float32).add(self.mean).to(self.dtype)}
        if self.weight is not None:
            tensors["weight"] = normal(hidden, self.weight)
        if self.bias is not None and self.center:
            tensors["bias"] = normal(hidden, self.bias)
        if self.residual is not None:
            tensors["residual"] = normal(self.shape, self.residual)
        return tensors

    def ours(self, backend: str | None) -> Norm:
        def norm(
            x: Tensor,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            residual: Tensor | None = None,
        ) -> Tensor | tuple[Tensor, Tensor]:
            torch.manual_seed(self.seed)
            options: Any = {"dropout_p": self.dropout_p, "backend": backend}
            if self.center:
                return fastattn.layer_norm(x, weight, bias, self.eps, residual, **options)
            return fastattn.rms_norm(x, weight, self.eps, residual, **options)

        return norm

    def kept(self, backend: str | None, x: Tensor) -> Tensor | None:
        """The elements of x that a call of `ours(backend)` keeps; None without dropout."""
        if not self.dropout_p:
            return None
        torch.manual_seed(self.seed)
        if backend == "torch":  # by PyTorch's own rule, which depends on strides
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.dropout(x, self.dropout_p).sum(), x)[0] != 0
        seed = dropout.draw_seed(torch.device(self.device))
        rows, hidden = math.prod(self.shape[:-1]), self.shape[-1]
        return dropout.keep(seed, self.dropout_p, rows, hidden).view(self.shape)

    def eager(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What a user of torch writes; where torch refuses the mixture of dtypes, in float32."""
        if kept is not None:  # as F.dropout does it
            x = x * (kept.to(x.dtype) / (1.0 - self.dropout_p))
        s = x if residual is None else x + residual

        def norm(s: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            if self.center:
                return F.layer_norm(s, s.shape[-1:], weight, bias, self.eps)
            return F.rms_norm(s, s.shape[-1:], weight, self.eps)

        # A lone bias fails only in the backward.
        lone = weight is None and bias is not None and bias.dtype != s.dtype
        try:
            out = norm(s.float() if lone else s, weight, bias).to(s.dtype)
        except RuntimeError:
            weight, bias = (p if p is None else p.float() for p in (weight, bias))
            out = norm(s.float(), weight, bias).to(s.dtype)
        return out if residual is None else (out, s)

    def definition(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if kept is not None:
            x = torch.where(kept, x / (1.0 - self.dropout_p), 0.0)
        s = x if residual is None else x + residual
        y = s - s.mean(-1, keepdim=True) if self.center else s
        out = y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt()
        out = out if weight is None else out * weight
        out = out if bias is None else out + bias
        return out if residual is None else (out, s)


def outputs_and_gradients(
    norm: Norm, inputs: dict[str, Tensor], cotangents: list[Tensor]
) -> dict[str, Tensor]:
    """`norm(**inputs)` and its gradients, by name."""
    return laws.results(norm, inputs, *cotangents, names=("out", "stream"))


def check(
    case: Case, backend: str | None, inputs: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs, dtypes and all gradients of `backend` under the rule; they are returned by name."""
    inputs = case.inputs() if inputs is None else inputs
    g = torch.Generator().manual_seed(case.seed + 1)
    shape = inputs["x"].shape
    stream = case.eager(**inputs)
    dtype = (stream[1] if isinstance(stream, tuple) else stream).dtype
    cotangents = [torch.randn(shape, generator=g).to(dtype).to(case.device) for _ in range(2)]
    ours = outputs_and_gradients(case.ours(backend), inputs, cotangents)
    kept = case.kept(backend, inputs["x"])
    eager = outputs_and_gradients(functools.partial(case.eager, kept=kept), inputs, cotangents)
    definition = functools.partial(case.definition, kept=kept)
    exact = outputs_and_gradients(definition, laws.doubled(inputs), cotangents)
    return laws.held(ours, eager, exact, case)
