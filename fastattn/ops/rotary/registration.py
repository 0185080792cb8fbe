"""The kernel backends' way in: `torch.ops.fastattn.rotary` and its backward.

Opaque to torch.compile, with fake implementations for tracing and autograd formulas up to the
second derivative. `backend` names who runs the forward; if the user named it (`forced`), the
backward stays on it too, else the backward chooses again. cos and sin have no gradient here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.common import autograd
from fastattn.ops.rotary import reference, results
from fastattn.ops.rotary.problem import RotaryProblem, describe

BACKENDS = backends.of_op("fastattn.ops.rotary", without=("gluon", "cuda"))


def run_kernel(
    backend: str,
    forced: bool,
    problem: RotaryProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of a call on a kernel backend."""
    rotated: tuple[torch.Tensor, torch.Tensor] = torch.ops.fastattn.rotary(
        q, k, cos, sin, positions, q_weight, k_weight, problem.rotary_dim, problem.interleaved,
        problem.eps, problem.weight_offset, backend, forced,
    )  # fmt: skip
    return rotated


def _described(
    q: torch.Tensor,
    k: torch.Tensor,
    angles: tuple[torch.Tensor | None, ...],
    weights: tuple[torch.Tensor | None, ...],
    settings: Sequence[Any],
) -> RotaryProblem:
    """The problem of a call by the tensors and settings of the operators."""
    cos, sin, positions = angles
    q_weight, k_weight = weights
    rotary_dim, interleaved, eps, weight_offset = settings
    assert cos is not None and sin is not None
    return describe(
        q, k, cos, sin, positions=positions, rotary_dim=rotary_dim, interleaved=interleaved,
        q_weight=q_weight, k_weight=k_weight, eps=eps, weight_offset=weight_offset,
    )  # fmt: skip


# --- forward ------------------------------------------------------------------------------------


def _forward(q, k, cos, sin, positions, q_weight, k_weight, *rest):  # type: ignore[no-untyped-def]
    *settings, backend, _ = rest
    kernel = backends.module_of(BACKENDS, backend)
    return kernel.forward(q, k, cos, sin, positions, q_weight, k_weight, *settings)


def _forward_fake(q, k, *_):  # type: ignore[no-untyped-def]
    return results.like(q), results.like(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, cos, sin, positions, q_weight, k_weight, *ctx.settings = inputs
    # A rotation is linear: only a norm needs its input again.
    q, k = (None if w is None else x for x, w in ((q, q_weight), (k, k_weight)))
    ctx.save_for_backward(q, k, cos, sin, positions, q_weight, k_weight)


def _autograd(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
    weight_grads = ctx.needs_input_grad[5:7]
    dq, dk, *dweights = torch.ops.fastattn.rotary_backward(
        dq, dk, *ctx.saved_tensors, *ctx.settings[:4], *weight_grads, *ctx.settings[4:]
    )
    dweights = [x if wanted else None for x, wanted in zip(dweights, weight_grads, strict=True)]
    return dq, dk, None, None, None, *dweights, *(None,) * 6


# --- backward -----------------------------------------------------------------------------------


def _backward(dq, dk, q, k, cos, sin, positions, q_weight, k_weight, *rest):  # type: ignore[no-untyped-def]
    *settings, q_weight_grad, k_weight_grad, backend, forced = rest
    problem = _described(dq, dk, (cos, sin, positions), (q_weight, k_weight), settings)
    kernel = backends.select_backward(problem.op, BACKENDS, problem, backend, forced)
    return kernel.backward(
        dq, dk, q, k, cos, sin, positions, q_weight, k_weight, *settings, q_weight_grad,
        k_weight_grad,
    )  # fmt: skip


def _backward_fake(dq, dk, q, k, cos, sin, positions, q_weight, k_weight, *rest):  # type: ignore[no-untyped-def]
    *_, q_weight_grad, k_weight_grad, _, _ = rest
    return (
        results.like(dq),
        results.like(dk),
        results.of_weight(dq, q_weight, q_weight_grad),
        results.of_weight(dk, k_weight, k_weight_grad),
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, (*ctx.settings, q_weight_grad, k_weight_grad, _, _) = inputs[:9], inputs[9:]
    ctx.weight_grads = q_weight_grad, k_weight_grad
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *directions: torch.Tensor | None) -> tuple[Any, ...]:
    dq, dk, q, k, *angles, q_weight, k_weight = ctx.saved_tensors

    def gradients(dq: Any, dk: Any, q: Any, k: Any, *weights: Any) -> list[torch.Tensor | None]:
        # Where there is no norm, the gradient does not depend on x.
        q, k = (
            torch.zeros_like(dx, requires_grad=True) if x is None else x
            for x, dx in ((q, dq), (k, dk))
        )
        problem = _described(q, k, tuple(angles), weights, ctx.settings)
        outs = reference.forward(problem, q, k, *angles, *weights)
        wanted = zip(weights, ctx.weight_grads, strict=True)
        inputs = [q, k, *(weight if want else None for weight, want in wanted)]
        return autograd.first_derivative(outs, inputs, [dq, dk])

    tensors = dq, dk, q, k, q_weight, k_weight
    first, second = autograd.double_backward(gradients, tensors, directions), (None,) * 3
    return *first[:4], *second, *first[4:], *(None,) * 8


autograd.register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, Tensor? q_weight, "
    "Tensor? k_weight, int rotary_dim, bool interleaved, float eps, float weight_offset, "
    "str backend, bool forced) -> (Tensor rotated_q, Tensor rotated_k)",
    _forward, _forward_fake, _setup_context, _autograd,
)  # fmt: skip
autograd.register(
    "rotary_backward(Tensor dq, Tensor dk, Tensor? q, Tensor? k, Tensor cos, Tensor sin, "
    "Tensor? positions, Tensor? q_weight, Tensor? k_weight, int rotary_dim, bool interleaved, "
    "float eps, float weight_offset, bool q_weight_grad, bool k_weight_grad, str backend, "
    "bool forced) -> (Tensor q_grad, Tensor k_grad, Tensor q_weight_grad_out, "
    "Tensor k_weight_grad_out)",
    _backward, _backward_fake, _backward_setup_context, _double_backward,
)  # fmt: skip
