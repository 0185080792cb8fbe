"""Kernels and autograd formulas of registered ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch.autograd import forward_ad


def register(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., tuple[torch.Tensor, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Give the op `fastattn::name` its kernel and a derivative.

    torch.library.register_autograd makes the function's context anew from a description of the
    schema in every call, which costs the host 20 us; this one takes 4. A forward-mode derivative
    raises here.

    Args:
        kernel: what runs the op, on all devices.
        setup_context: (ctx, inputs, output) -> None, keeps what the backward needs.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs.
    """
    library.impl(name, kernel, "CompositeExplicitAutograd")
    op = getattr(torch.ops.fastattn, name).default
    types = [str(argument.type) for argument in op._schema.arguments]
    tensors = itemgetter(*(i for i, kind in enumerate(types) if "Tensor" in kind))

    def formula(run: Callable[..., Any]) -> Any:
        class Formula(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    output = tuple(run(*inputs))  # a list would be no output to autograd
                setup_context(ctx, inputs, output)
                return output

        Formula.backward = staticmethod(backward)  # type: ignore[method-assign]
        return Formula

    # Function's own `apply` first looks through all arguments for wrappers of transforms.
    differentiable_kernel = super(torch.autograd.Function, formula(kernel)).apply
    differentiable_op = formula(op).apply

    def differentiable(*inputs: Any) -> Any:
        given = [x for x in tensors(inputs) if x is not None]
        alone = _kernel_alone(given)
        if torch.is_grad_enabled():
            for x in given:
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    return differentiable_kernel(*inputs) if alone else differentiable_op(*inputs)
        if forward_ad._current_level >= 0:
            return differentiable_op(*inputs)  # which raises if an input has a tangent
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*inputs) if alone else op(*inputs)

    library.impl(name, differentiable, "Autograd")


def _kernel_alone(tensors: list[Any]) -> bool:
    """Whether nothing but the kernel is left for the dispatcher to run, below autograd.

    It takes 9 us to find that out with attention's 29 arguments. There must be no mode, no
    transform, and no tensor with a dispatch key of its own: subclasses, fake, meta, functional,
    negated ones, wrappers. A list of tensors is not looked into.
    """
    if torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    usual = _usual_keys(tensors[0].device)
    if usual is None:
        return False
    for x in tensors:  # noqa: SIM110  # `all` takes longer
        if isinstance(x, list) or torch._C._dispatch_keys(x) != usual:
            return False
    return True


@functools.cache
def _usual_keys(device: torch.device) -> Any:
    """The dispatch keys of a plain tensor on `device`; None for meta, which has no kernel."""
    if device.type == "meta":
        return None
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device=device))
