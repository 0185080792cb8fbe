"""A linear layer whose output is added to a residual and then normed, as BERT has it.

    norm(dropout(dense(x)) + residual)

The layer is called as it is; dropout, addition and norm are one call of `layer_norm` or `rms_norm`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch

from fastattn.backends import explanation_of
from fastattn.integrations.hypotheses.feed_forward import sizes
from fastattn.integrations.hypotheses.norm import Norm, norms_of
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.nn.plain import is_plain


@dataclass(frozen=True)
class PostNorm:
    """Under which names a module keeps its parts.

    Attributes:
        dropout: None if there is none.
        kind: what `norm` is, of the class `norm_type`.
    """

    dense: str
    dropout: str | None
    norm: str
    kind: Norm
    norm_type: type[torch.nn.Module]

    def __str__(self) -> str:
        return f"{self.kind} of {self.dense} and a residual"

    def call(self, module: Any, x: torch.Tensor, residual: torch.Tensor, p: float) -> Any:
        """Our function, its arguments and its options."""
        function, args = self.kind.call(getattr(module, self.norm), x)
        return function, args, {"residual": residual, "dropout_p": p}


class PostNormSwap(torch.nn.Module):
    """Norms the sum of a dropout and a residual in one call.

    Its own forward may see it through a view (hypotheses/inner.py), so that no part is taken from
    `_modules`.
    """

    _fastattn_original: ClassVar[Any]
    _fastattn_bound: ClassVar[PostNorm]

    @staticmethod
    def recogniser(bound: PostNorm) -> Recogniser:
        return recogniser(bound)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._fastattn_bound
        # At every call, because hooks and other modules come and go.
        if len(args) != 2 or kwargs or _refusal(self, bound):
            return self._fastattn_original.forward(self, *args, **kwargs)
        x, residual = getattr(self, bound.dense)(args[0]), args[1]
        dropout: Any = None if bound.dropout is None else getattr(self, bound.dropout)
        p = dropout.p if dropout is not None and dropout.training else 0.0
        norm: Any = getattr(self, bound.norm)
        if p == 1 or not _suits(x, residual, norm):
            return norm((x if dropout is None else dropout(x)) + residual)
        function, tensors, options = bound.call(self, x, residual, p)
        return function(*tensors, **options)[0]


def _suits(x: Any, residual: Any, norm: torch.nn.Module) -> bool:
    """Whether all are of one dtype, which our norm answers in."""
    return (
        isinstance(x, torch.Tensor)
        and isinstance(residual, torch.Tensor)
        and x.shape == residual.shape
        and all(p is None or p.dtype is x.dtype for p in (*norm._parameters.values(), residual))
    )


def recogniser(bound: PostNorm) -> Recogniser:
    def probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
        width, hidden = sizes(getattr(module, bound.dense))
        x, residual = draw.normal(2, 7, width), draw.normal(2, 7, hidden)
        small = draw.normal(3, width) * 1e-3, draw.normal(3, hidden) * 1e-3  # where eps counts
        return [Probe((x, residual + 4.0)), Probe(small)]

    def backend(module: torch.nn.Module, probe: Probe) -> str | None:
        residual = probe.args[1]
        function, args, options = bound.call(module, residual, residual, 0.0)
        return explanation_of(function, *args, **options).backend

    return Recogniser(
        words=str(bound),
        mixin=PostNormSwap,
        probes=probes,
        backend=backend,
        refusal=lambda module: _refusal(module, bound),
        premise=lambda module, draw: _misplaced(module, bound, probes(module, draw)[0]),
        bound=bound,
        fused=lambda module: [getattr(module, n) for n in (bound.dropout, bound.norm) if n],
        whole=False,
    )


def _refusal(module: torch.nn.Module, bound: PostNorm) -> str | None:
    """Why the parts of `module` cannot be computed without being called, or None."""
    parts: list[tuple[str, type[torch.nn.Module]]] = [(bound.norm, bound.norm_type)]
    if bound.dropout is not None:
        parts.append((bound.dropout, torch.nn.Dropout))
    for name, cls in parts:
        part = getattr(module, name, None)
        if not isinstance(part, torch.nn.Module) or not is_plain(part, cls):
            return f"{name} is a {type(part).__name__} that must be called itself"
    return None


def _misplaced(module: torch.nn.Module, bound: PostNorm, probe: Probe) -> str | None:
    """Why the dropout is not where `bound` says, from a run in which it drops and is watched."""
    if bound.dropout is None:
        return None
    dense, dropout, norm = (getattr(module, n) for n in (bound.dense, bound.dropout, bound.norm))
    seen: list[torch.Tensor] = []
    before, dropout.p = dropout.p, 0.5
    try:
        with (
            dense.register_forward_hook(lambda _, args, out: seen.append(out)),
            dropout.register_forward_hook(lambda _, args, out: seen.extend((args[0], out))),
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        ):
            module.train()
            module(*probe.args)
    finally:
        dropout.p = before
    if len(seen) == 4 and seen[0] is seen[1] and torch.equal(seen[2] + probe.args[1], seen[3]):
        return None
    return f"{bound.dropout} drops something else than the output of {bound.dense}"


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    if not isinstance(type(module).forward, FunctionType):
        return
    arguments = inspect.signature(type(module).forward).parameters.values()
    needed = [a for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    own = (*module._parameters.values(), *module._buffers.values())
    if len(needed) != 3 or any(p is not None for p in own):  # self, x, residual
        return
    layers: list[str] = []
    dropouts: list[str] = []
    others: list[str] = []
    for name, child in module.named_children():
        of_its_kind = (
            layers if sizes(child) else dropouts if isinstance(child, torch.nn.Dropout) else others
        )
        of_its_kind.append(name)
    if len(layers) != 1 or len(dropouts) > 1 or len(others) != 1:
        return
    norm = getattr(module, others[0])
    cls = getattr(type(norm), "_fastattn_original", type(norm))
    for kind in norms_of(norm):
        if not kind.offset:
            yield recogniser(PostNorm(layers[0], next(iter(dropouts), None), others[0], kind, cls))
