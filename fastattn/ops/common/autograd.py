"""Kernels and autograd formulas of registered ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch.autograd import forward_ad

Results = torch.Tensor | tuple[torch.Tensor, ...]  # as the schema has them

_library = torch.library.Library("fastattn", "FRAGMENT")


def define(
    schema: str,
    kernel: Callable[..., Results],
    fake: Callable[..., Results],
) -> str:
    """Define an op `fastattn::NAME`, opaque to torch.compile, and return its name.

    Args:
        schema: "NAME(...) -> (...)", in torch.library's words.
        kernel: what runs the op, on all devices.
        fake: its results without data, for tracing.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_library)
    return name


def register(
    schema: str,
    kernel: Callable[..., Results],
    fake: Callable[..., Results],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """`define` an op with a derivative.

    torch.library.register_autograd makes the function's context again from a description of the
    schema in every call, which costs the host 20 us; this one takes 4. A forward-mode derivative
    raises here.

    Args:
        schema, kernel, fake: as `define` has them.
        setup_context: (ctx, inputs, output) -> None, keeps what the backward needs.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs.
    """
    name = define(schema, kernel, fake)
    op = getattr(torch.ops.fastattn, name).default
    types = [str(argument.type) for argument in op._schema.arguments]
    tensors = itemgetter(*(i for i, kind in enumerate(types) if "Tensor" in kind))

    def formula(run: Callable[..., Any]) -> Any:
        class Formula(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                # Below the keys that remember views: a result that is a view of a tensor made in
                # here could not be modified in place outside.
                with torch._C._AutoDispatchBelowADInplaceOrView():
                    output = run(*inputs)
                if not isinstance(output, torch.Tensor):
                    output = tuple(output)  # a list would be no output to autograd
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
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return kernel(*inputs) if alone else op(*inputs)

    _library.impl(name, differentiable, "Autograd")


def double_backward(
    gradients: Callable[..., Sequence[torch.Tensor | None]],
    tensors: Sequence[torch.Tensor | None],
    directions: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """The derivative of a backward op, by differentiating the reference twice.

    What a forward has kept for the backward op is a function of the inputs, through which the whole
    derivative is taken.

    Args:
        gradients: (*tensors) -> the results of the backward op, made of the reference by
            `first_derivative`, None for those that the op was not asked for.
        tensors: the inputs of the backward op that have a derivative, as it got them.
        directions: gradients of its results.

    Returns:
        The gradients of `tensors`.
    """
    with torch.enable_grad():
        leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
        results = gradients(*leaves)
        pairs = [
            (y, dy)
            for y, dy in zip(results, directions, strict=True)
            if y is not None and dy is not None
        ]
        if not pairs:  # nothing comes from above
            return [None] * len(leaves)
        reached, given = zip(*pairs, strict=True)
        wanted = [x for x in leaves if x is not None]
        second = iter(torch.autograd.grad(reached, wanted, given, allow_unused=True))
    return [None if x is None else next(second) for x in leaves]


def first_derivative(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    directions: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """The differentiable gradients of those `inputs` that are not None."""
    given = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(outputs, given, directions, create_graph=True))
    return [None if x is None else next(found) for x in inputs]


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
