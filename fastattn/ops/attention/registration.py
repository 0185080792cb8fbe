"""The kernel backends' way in: `torch.ops.fastattn.attention` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. `backend` names who runs the forward; if the user named it (`forced`), the
backward stays on it too, else the backward chooses again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastattn import backends
from fastattn.ops.attention import reference
from fastattn.ops.attention.call import Extras, Learnt, Settings, results, schema
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import autograd, dropout, flops, recovery

BACKENDS = backends.of_op("fastattn.ops.attention")

_CALL = f"{schema(Extras)}, {schema(Settings)}, str backend, bool forced"
_GRADIENTS = ", ".join(f"Tensor d{name}" for name in ("q", "k", "v", *Learnt._fields))
_EXTRAS, _SETTINGS = len(Extras._fields), len(Settings._fields)
_BLOCKS = Extras._fields.index("blocks")
_LEARNT = [Extras._fields.index(name) for name in Learnt._fields]


def run_kernel(
    backend: str,
    forced: bool,
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call on a kernel backend."""
    if problem.dropout_p and extras.dropout_seed is None:
        extras = extras._replace(dropout_seed=dropout.draw_seed(q.device))
    return torch.ops.fastattn.attention(q, k, v, *extras, *problem.settings, backend, forced)


def _split(call: tuple[Any, ...]) -> tuple[Extras, Settings, str, bool]:
    """The arguments of _CALL as they were."""
    extras, settings = Extras(*call[:_EXTRAS]), Settings(*call[_EXTRAS : _EXTRAS + _SETTINGS])
    if extras.blocks is not None:
        extras = extras._replace(blocks=tuple(extras.blocks))
    backend, forced = call[-2:]
    return extras, settings, backend, forced


# --- forward ------------------------------------------------------------------------------------


def _forward(q, k, v, *call):  # type: ignore[no-untyped-def]
    extras, settings, backend, forced = _split(call)
    try:
        return backends.module_of(BACKENDS, backend).forward(q, k, v, extras, settings)
    except Exception as error:
        problem = _problem(q, k, v, extras, settings)
        kernel = recovery.next_kernel(error, BACKENDS, backend, forced, problem, _families(problem))
    return _forward(q, k, v, *call[:-2], kernel, forced)


def _problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, settings: Settings
) -> AttentionProblem:
    """The call that an operator got; transforms around it are about other calls."""
    problem = AttentionProblem.of(q, k, v, extras, settings, return_lse=False)
    return dataclasses.replace(problem, transformed=False)


def _families(problem: AttentionProblem) -> list[AttentionProblem]:
    """The calls that the same kernels run; the operator does not know which of them it is."""
    return [
        dataclasses.replace(problem, return_lse=return_lse, needs_grad=needs_grad)
        for return_lse in (False, True)
        for needs_grad in (False, True)
    ]


def _forward_fake(q, k, v, *call):  # type: ignore[no-untyped-def]
    return results(q, v)


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
    # What wants no gradient saves its reduction.
    wanted = [ctx.needs_input_grad[3 + place] for place in _LEARNT]
    dq, dk, dv, *learnt = torch.ops.fastattn.attention_backward(
        dout, dlse, out, lse, wanted, *inputs, *call
    )
    grads[:3] = dq, dk, dv
    for place, wants, grad in zip(_LEARNT, wanted, learnt):
        if wants:
            grads[3 + place] = grad
    return tuple(grads)


# --- backward -----------------------------------------------------------------------------------


def _backward(dout, dlse, out, lse, wanted, q, k, v, *call):  # type: ignore[no-untyped-def]
    extras, settings, backend, forced = _split(call)
    wanted = Learnt(*wanted)
    problem = _problem(q, k, v, extras, settings)
    problem = dataclasses.replace(problem, needs_bias_grad=wanted.bias)
    kernel = backends.select_backward("attention", BACKENDS, problem, backend, forced)
    try:
        return kernel.backward(dout, dlse, out, lse, wanted, q, k, v, extras, settings)
    except Exception as error:
        families = [x for x in _families(problem) if x.needs_grad]
        name = backends.name_of(BACKENDS, kernel)
        name = recovery.next_kernel(error, BACKENDS, name, forced, problem, families, backward=True)
    return _backward(dout, dlse, out, lse, wanted, q, k, v, *call[:-2], name, forced)


def _backward_fake(dout, dlse, out, lse, wanted, q, k, v, *call):  # type: ignore[no-untyped-def]
    learnt = [call[place] if wants else None for place, wants in zip(_LEARNT, wanted)]
    return tuple(
        q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in (q, k, v, *learnt)
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, dlse, _, _, ctx.wanted, q, k, v, *call = inputs
    _keep(ctx, q, k, v, tuple(call), dout, dlse)


def _double_backward(ctx: Any, *directions: torch.Tensor | None) -> tuple[Any, ...]:
    (q, k, v), (dout, dlse), call = _kept(ctx, 2)
    extras, settings, _, _ = _split(call)

    def gradients(
        dout: Any, dlse: Any, q: Any, k: Any, v: Any, *learnt: Any
    ) -> list[torch.Tensor | None]:
        leaves = zip(Learnt._fields, learnt)
        given = extras._replace(**{name: x for name, x in leaves if x is not None})
        problem = AttentionProblem.of(q, k, v, given, settings, return_lse=True)
        out, lse = reference.forward(problem, q, k, v, given)
        outputs, directions = [out], [dout]
        if dlse is not None:
            # The LSE of a row without a key is constant, and its direction may be anything.
            seen = lse != float("-inf")
            outputs, directions = [out, lse.where(seen, 0.0)], [dout, dlse.where(seen, 0.0)]
        return autograd.first_derivative(outputs, [q, k, v, *learnt], directions)

    learnt = [x if wants else None for x, wants in zip(Learnt.of(extras), ctx.wanted)]
    ddout, ddlse, dq, dk, dv, *of_learnt = autograd.double_backward(
        gradients, [dout, dlse, q, k, v, *learnt], directions
    )
    of_call: list[Any] = [None] * len(call)
    for place, grad in zip(_LEARNT, of_learnt):
        of_call[place] = grad
    return ddout, ddlse, None, None, None, dq, dk, dv, *of_call


autograd.register(
    f"attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse)",
    _forward, _forward_fake, _setup_context, _autograd,
)  # fmt: skip
autograd.register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool[] wanted, "
    f"Tensor q, Tensor k, Tensor v, {_CALL}) -> ({_GRADIENTS})",
    _backward, _backward_fake, _backward_setup_context, _double_backward,
)  # fmt: skip


# --- floating-point operations --------------------------------------------------------------------


def _flops(q, k, v, *call):  # type: ignore[no-untyped-def]
    """Two products; what a mask hides counts, as torch counts its own attention."""
    return 2 * _scores(q, k, call) * (q.shape[-1] + v.shape[-1])


def _backward_flops(dout, dlse, out, lse, wanted, q, k, v, *call):  # type: ignore[no-untyped-def]
    """The scores again and the products for dq and dk; those for dp and dv."""
    return 2 * _scores(q, k, call) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _scores(q: torch.Tensor, k: torch.Tensor, call: tuple[Any, ...]) -> int:
    """Elements of the score matrices of all heads and sequences."""
    if q.dim() == 4:
        return q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    extras, settings, _, _ = _split(call)
    starts_q, starts_k = extras.cu_seqlens_q, extras.cu_seqlens_k
    assert starts_q is not None and starts_k is not None
    if starts_q.is_meta or isinstance(starts_q, FakeTensor):  # all as long as the longest
        longest = settings.max_seqlen_q * settings.max_seqlen_k
        return q.shape[1] * (starts_q.shape[0] - 1) * longest
    of_q, of_k = (x.diff().clamp(min=0).cpu().long() for x in (starts_q, starts_k))
    return q.shape[1] * int((of_q * of_k).sum())


flops.register("attention", _flops)
flops.register("attention_backward", _backward_flops)
