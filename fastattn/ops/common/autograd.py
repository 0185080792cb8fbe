"""Autograd formulas for registered ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register(
    library: torch.library.Library,
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Give the op `fastattn::name` a derivative, as torch.library.register_autograd does.

    That one makes the function's context anew from a description of the schema in every call, which
    costs the host 20 us; this one takes 4. A forward-mode derivative raises here.

    Args:
        setup_context: (ctx, inputs, output) -> None, keeps what the backward needs.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs.
    """
    op = getattr(torch.ops.fastattn, name).default

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Formula.backward = staticmethod(backward)  # type: ignore[method-assign]

    def differentiable(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
        ):
            return Formula.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    library.impl(name, differentiable, "Autograd")
