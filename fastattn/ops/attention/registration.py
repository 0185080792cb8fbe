"""The kernel backends' way in: `torch.ops.fastattn.attention` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. `backend` names who runs the forward; if the user named it (`forced`), the
backward stays on it too, else the backward chooses anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.attention import dropout, reference
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import autograd, faster


def _load_cuda() -> ModuleType:
    from fastattn.ops.attention import cuda

    return cuda


def _load_triton() -> ModuleType:
    from fastattn.ops.attention import triton

    return triton


KERNELS = (
    backends.Backend("cuda", _load_cuda, faster.declined),
    backends.Backend("triton", _load_triton),
)

# Extras, then Settings, in their order; `blocks` is a list, the rest are single tensors.
_CALL = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? key_lengths, "
    "Tensor? q_documents, Tensor? k_documents, Tensor[]? blocks, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? dropout_seed, "
    "SymInt window_left, SymInt window_right, bool top_left, float softmax_scale, float softcap, "
    "float dropout_p, str fp32_precision, SymInt max_seqlen_q, SymInt max_seqlen_k, int block_q, "
    "int block_k, str backend, bool forced"
)
_EXTRAS, _SETTINGS = len(Extras._fields), len(Settings._fields)
_BLOCKS = Extras._fields.index("blocks")
_BIAS, _SINK = Extras._fields.index("bias"), Extras._fields.index("sink")

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(f"attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse)")
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool bias_grad, "
    f"bool sink_grad, Tensor q, Tensor k, Tensor v, {_CALL}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)"
)


def entry(backend: backends.Backend, problem: AttentionProblem, forced: bool) -> Callable[..., Any]:
    """What runs a call on `backend`: f(problem, q, k, v, extras) -> (out, lse)."""
    if backend.name == "torch":
        return backend.module.attention
    run = (
        backend.module.attention
        if backend.name == "reference"
        else functools.partial(_through_registered_op, backend.name, forced)
    )
    return functools.partial(_with_seed, run) if problem.dropout_p else run


def _with_seed(
    run: Callable[..., Any], problem: AttentionProblem, q: Any, k: Any, v: Any, extras: Extras
) -> Any:
    extras = extras._replace(dropout_seed=dropout.draw_seed(q.device))
    return run(problem, q, k, v, extras)


def _through_registered_op(
    backend: str,
    forced: bool,
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.fastattn.attention(q, k, v, *extras, *problem.settings, backend, forced)


@functools.cache
def _kernel(name: str) -> Any:
    return next(b for b in KERNELS if b.name == name).module


def _split(call: tuple[Any, ...]) -> tuple[Extras, Settings, str, bool]:
    """The arguments of _CALL as they were."""
    extras, settings = Extras(*call[:_EXTRAS]), Settings(*call[_EXTRAS : _EXTRAS + _SETTINGS])
    if extras.blocks is not None:
        extras = extras._replace(blocks=tuple(extras.blocks))
    backend, forced = call[-2:]
    return extras, settings, backend, forced


# --- forward ------------------------------------------------------------------------------------


def _forward(q, k, v, *call):  # type: ignore[no-untyped-def]
    extras, settings, backend, _ = _split(call)
    return _kernel(backend).forward(q, k, v, extras, settings)


def _forward_fake(q, k, v, *call):  # type: ignore[no-untyped-def]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if q.dim() == 3:
        return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _keep(ctx: Any, q: Any, k: Any, v: Any, call: tuple[Any, ...], *more: Any) -> None:
    """Save the tensors among the arguments for the backward, and remember the others."""
    tensors = list(call[:_EXTRAS])
    blocks = tensors.pop(_BLOCKS) or ()
    ctx.save_for_backward(q, k, v, *more, *tensors, *blocks)
    ctx.options = call[_EXTRAS:]


def _kept(ctx: Any, more: int) -> tuple[list[Any], list[Any], tuple[Any, ...]]:
    """(q, k, v), what came with them, and the arguments of _CALL."""
    saved = list(ctx.saved_tensors)
    rest = saved[3 + more :]
    tensors, blocks = rest[: _EXTRAS - 1], rest[_EXTRAS - 1 :]
    tensors.insert(_BLOCKS, blocks or None)
    return saved[:3], saved[3 : 3 + more], (*tensors, *ctx.options)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, *call = inputs
    _keep(ctx, q, k, v, tuple(call), *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    inputs, (out, lse), call = _kept(ctx, 2)
    grads: list[Any] = [None] * (3 + len(call))
    if dout is None and dlse is None:
        return tuple(grads)
    if dout is None:
        dout = torch.zeros_like(out)
    # A bias or sink that wants no gradient saves its reduction.
    bias_grad, sink_grad = ctx.needs_input_grad[3 + _BIAS], ctx.needs_input_grad[3 + _SINK]
    *dqkv, dbias, dsink = torch.ops.fastattn.attention_backward(
        dout, dlse, out, lse, bias_grad, sink_grad, *inputs, *call
    )
    grads[:3] = dqkv
    if bias_grad:
        grads[3 + _BIAS] = dbias
    if sink_grad:
        grads[3 + _SINK] = dsink
    return tuple(grads)


# --- backward -----------------------------------------------------------------------------------


def _backward(dout, dlse, out, lse, bias_grad, sink_grad, q, k, v, *call):  # type: ignore[no-untyped-def]
    extras, settings, backend, forced = _split(call)
    problem = AttentionProblem.of(q, k, v, extras, settings, return_lse=True)
    # What is transformed around the call of `backward` is about other calls.
    problem = dataclasses.replace(problem, transformed=False, needs_bias_grad=bias_grad)
    kernel = backends.select_backward("attention", KERNELS, problem, backend, forced)
    return kernel.backward(dout, dlse, out, lse, bias_grad, sink_grad, q, k, v, extras, settings)


def _backward_fake(dout, dlse, out, lse, bias_grad, sink_grad, q, k, v, *call):  # type: ignore[no-untyped-def]
    bias, sink = call[_BIAS], call[_SINK]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        bias.new_empty(bias.shape) if bias_grad else q.new_empty((0,)),
        sink.new_empty(sink.shape) if sink_grad else q.new_empty((0,)),
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, dlse, _, _, ctx.bias_grad, ctx.sink_grad, q, k, v, *call = inputs
    _keep(ctx, q, k, v, tuple(call), dout, dlse)


def _double_backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    """The second derivative, by differentiating the reference twice.

    `out` and `lse` are functions of the inputs, through which the whole derivative is taken.
    """
    (q, k, v), (dout, dlse), call = _kept(ctx, 2)
    extras, settings, _, _ = _split(call)

    def leaf(x: Any, wanted: bool = True) -> Any:
        return x if x is None or not wanted else x.detach().requires_grad_()

    with torch.enable_grad():
        dout, dlse, q, k, v = (leaf(x) for x in (dout, dlse, q, k, v))
        bias, sink = leaf(extras.bias, ctx.bias_grad), leaf(extras.sink, ctx.sink_grad)
        extras = extras._replace(bias=bias, sink=sink)
        problem = AttentionProblem.of(q, k, v, extras, settings, return_lse=True)
        out, lse = reference.attention(problem, q, k, v, extras)
        outputs, directions = [out], [dout]
        if dlse is not None:
            # The LSE of a row without a key is constant, and its direction may be anything.
            seen = lse != float("-inf")
            outputs, directions = [out, lse.where(seen, 0.0)], [dout, dlse.where(seen, 0.0)]
        inputs, wanted = [q, k, v], list(grads[:3])
        for x, grad, given in ((bias, grads[3], ctx.bias_grad), (sink, grads[4], ctx.sink_grad)):
            if given:
                inputs.append(x)
                wanted.append(grad)
        first = torch.autograd.grad(outputs, inputs, directions, create_graph=True)
        leaves = [x for x in (dout, dlse, *inputs) if x is not None]
        second = torch.autograd.grad(first, leaves, wanted, allow_unused=True)
    found = {id(x): g for x, g in zip(leaves, second)}
    result: list[Any] = [found.get(id(x)) for x in (dout, dlse)] + [None] * 4
    result += [found.get(id(x)) for x in (q, k, v)]
    extra_grads: list[Any] = [None] * len(call)
    extra_grads[_BIAS] = found.get(id(bias)) if ctx.bias_grad else None
    extra_grads[_SINK] = found.get(id(sink)) if ctx.sink_grad else None
    return *result, *extra_grads


torch.library.register_fake("fastattn::attention", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::attention_backward", _backward_fake, lib=_library)
autograd.register(_library, "attention", _forward, _setup_context, _autograd)
autograd.register(
    _library, "attention_backward", _backward, _backward_setup_context, _double_backward
)
