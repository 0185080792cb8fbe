"""The registered ops of dense layers, linear and ffn: what both say of them.

A forward returns (out, pre), the sums before the activation, which a backward wants; pre has no
elements unless `save_pre`. A backward computes what `needs` asks for; the other gradients have no
elements. `backend` names who runs the forward; if the user named it (`forced`), the backward stays
on it too, else the backward chooses again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.ops.common import autograd
from fastattn.ops.common.matrices import gradient_like

Tensors = tuple[torch.Tensor | None, ...]


def register(
    name: str,
    tensors: str,
    options: str,
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    formula: Callable[..., torch.Tensor],
) -> None:
    """Define `fastattn::NAME` and its backward, with derivatives up to the second.

    Args:
        tensors, options: arguments as a schema has them; the first tensor is x.
        forward, forward_fake: (*tensors, *options, save_pre, backend, forced) -> (out, pre).
        backward: (dout, *tensors, pre, needs, *options, backend, forced) -> gradients.
        formula: (tensors, *options) -> out, by the definition.
    """
    names = [tensor.split()[-1] for tensor in tensors.split(", ")]
    count, left = len(names), len(options.split(", ")) + 3  # arguments without a gradient

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *options, save_pre, backend, forced = inputs[count:]
        _, pre = output
        ctx.mark_non_differentiable(pre)
        ctx.save_for_backward(*inputs[:count], pre if save_pre else None)
        ctx.options = (*options, backend, forced)
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, dout: torch.Tensor | None, _: None) -> Tensors:
        if dout is None:
            return (None,) * (count + left)
        needs = ctx.needs_input_grad[:count]
        op = getattr(torch.ops.fastattn, f"{name}_backward")
        grads = op(dout, *ctx.saved_tensors, needs, *ctx.options)
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *wanted, *(None,) * left

    def backward_fake(dout: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
        x, needs = inputs[0], inputs[count + 1]

        def gradient(t: torch.Tensor, need: bool) -> torch.Tensor:
            if need and t is not x and t.dim() == 2:
                return gradient_like(t)
            return x.new_empty(t.shape if need else (0,))

        return tuple(gradient(t, need) for t, need in zip(inputs[:count], needs, strict=True))

    def backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[: count + 1])
        ctx.needs, *ctx.options = inputs[count + 2 : -2]

    def double_backward(ctx: Any, *directions: torch.Tensor | None) -> Tensors:
        def first(dout: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor | None]:
            wanted = [t if need else None for t, need in zip(tensors, ctx.needs, strict=True)]
            return autograd.first_derivative([formula(tensors, *ctx.options)], wanted, [dout])

        second = autograd.double_backward(first, ctx.saved_tensors, directions)
        return *second, *(None,) * (left + 1)

    autograd.register(
        f"{name}({tensors}, {options}, bool save_pre, str backend, bool forced) "
        "-> (Tensor out, Tensor pre)",
        forward, forward_fake, setup_context, gradients,
    )  # fmt: skip
    autograd.register(
        f"{name}_backward(Tensor dout, {tensors}, Tensor? pre, bool[{count}] needs, {options}, "
        f"str backend, bool forced) -> ({', '.join(f'Tensor d{x}' for x in names)})",
        backward, backward_fake, backward_setup_context, double_backward,
    )  # fmt: skip
