"""The kernel backends' way in: `torch.ops.fastattn.attention` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. `backend` names who runs the forward; if the user named it (`forced`), the
backward stays on it too, else the backward chooses anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.attention import reference
from fastattn.ops.attention.problem import AttentionProblem, describe
from fastattn.ops.common import autograd


def _load_triton() -> ModuleType:
    from fastattn.ops.attention import triton

    return triton


KERNELS = (backends.Backend("triton", _load_triton),)

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? key_lengths, bool causal, "
    "float softmax_scale, str backend, bool forced) -> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? mask, "
    "Tensor? key_lengths, Tensor out, Tensor lse, bool causal, float softmax_scale, str backend, "
    "bool forced) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def entry(backend: backends.Backend, forced: bool) -> Callable[..., Any]:
    """What runs a call on `backend`: f(problem, q, k, v, mask, key_lengths) -> (out, lse)."""
    if backend.name in ("torch", "reference"):
        return backend.module.attention
    return functools.partial(_through_registered_op, backend.name, forced)


def _through_registered_op(
    backend: str,
    forced: bool,
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.fastattn.attention(
        q, k, v, mask, key_lengths, problem.causal, problem.softmax_scale, backend, forced
    )


def _kernel(name: str) -> Any:
    return next(b for b in KERNELS if b.name == name).module


# --- forward ------------------------------------------------------------------------------------


def _forward(q, k, v, mask, key_lengths, causal, softmax_scale, backend, forced):  # type: ignore[no-untyped-def]
    return _kernel(backend).forward(q, k, v, mask, key_lengths, causal, softmax_scale)


def _forward_fake(q, k, v, mask, key_lengths, causal, softmax_scale, backend, forced):  # type: ignore[no-untyped-def]
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(q.shape)
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, mask, key_lengths, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask, key_lengths, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, mask, key_lengths, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 9
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.fastattn.attention_backward(
        dout, dlse, q, k, v, mask, key_lengths, out, lse, *ctx.options
    )
    return *grads, *(None,) * 6


# --- backward -----------------------------------------------------------------------------------


def _backward(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, mask, key_lengths, out, lse, causal, softmax_scale, backend, forced
):
    problem = _described(q, k, v, mask, key_lengths, causal, softmax_scale)
    kernel = backends.select("attention", KERNELS, problem, backend if forced else None)
    return kernel.module.backward(
        dout, dlse, q, k, v, mask, key_lengths, out, lse, causal, softmax_scale
    )


def _backward_fake(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, mask, key_lengths, out, lse, causal, softmax_scale, backend, forced
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, dlse, q, k, v, mask, key_lengths, _, _, ctx.causal, ctx.softmax_scale, _, _ = inputs
    ctx.save_for_backward(dout, dlse, q, k, v, mask, key_lengths)


def _double_backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    """The second derivative, by differentiating the reference twice.

    `out` and `lse` are functions of q, k, v, through which the whole derivative is taken.
    """
    dout, dlse, q, k, v, mask, key_lengths = ctx.saved_tensors
    with torch.enable_grad():
        inputs = (dout, dlse, q, k, v)
        leaves: list[Any] = [x if x is None else x.detach().requires_grad_() for x in inputs]
        dout, dlse, q, k, v = leaves
        problem = _described(q, k, v, mask, key_lengths, ctx.causal, ctx.softmax_scale)
        out, lse = reference.attention(problem, q, k, v, mask, key_lengths)
        outputs, directions = [out], [dout]
        if dlse is not None:
            outputs, directions = [out, lse], [dout, dlse]
        first = torch.autograd.grad(outputs, (q, k, v), directions, create_graph=True)
        wanted = [x for x in leaves if x is not None]
        second = iter(torch.autograd.grad(first, wanted, grads, allow_unused=True))
    return *(None if x is None else next(second) for x in leaves), *(None,) * 8


def _described(q, k, v, mask, key_lengths, causal, softmax_scale) -> AttentionProblem:  # type: ignore[no-untyped-def]
    return describe(
        q, k, v, causal=causal, softmax_scale=softmax_scale, mask=mask, key_lengths=key_lengths,
        return_lse=True,
    )  # fmt: skip


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::attention_backward", _backward_fake, lib=_library)
autograd.register(_library, "attention", _setup_context, _autograd)
autograd.register(_library, "attention_backward", _backward_setup_context, _double_backward)
