"""A call of linear_cross_entropy apart from its data, and every error that a user can make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.dense import BY_ROWS, check_floating, dtype_name
from fastattn.ops.cross_entropy.problem import (
    IGNORED,
    Options,
    check_class_weight,
    check_options,
    check_targets,
)


@dataclass(frozen=True)
class LinearLossProblem:
    """Metadata of one call, checked."""

    x_shape: tuple[int, ...]  # (..., D)
    classes: int
    dtype: torch.dtype  # of the products: autocast's, where autocast is on
    device: torch.device
    has_bias: bool
    class_weight_dtype: torch.dtype | None
    options: Options
    autocast: bool
    needs_grad: bool
    needs: tuple[bool, bool, bool]  # gradients of x, weight, bias
    transformed: bool

    op = "linear_cross_entropy"

    @property
    def elements(self) -> int:
        """The problem's size where backends are compared (measured.py): multiplications."""
        return math.prod(self.x_shape) * self.classes

    @property
    def logits(self) -> int:
        """How many logits there would be."""
        return math.prod(self.x_shape[:-1]) * self.classes

    def describe(self) -> str:
        weight = self.class_weight_dtype
        facts = [
            f"x {tuple(self.x_shape)}, {self.classes} classes, {dtype_name(self.dtype)}",
            "bias" if self.has_bias else "",
            "" if weight is None else f"class_weight {dtype_name(weight)}",
            self.options.describe(),
            "under autocast" if self.autocast else "",
            "with gradients" if self.needs_grad else "",
            "under a torch.func transform or forward-mode AD" if self.transformed else "",
            f"on {self.device}",
        ]
        return ", ".join(filter(None, facts))


def describe(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> LinearLossProblem:
    """The problem of a call. Raises TypeError or ValueError for every error of the caller."""
    options = Options(ignore_index, label_smoothing, z_loss, logit_scale, softcap, reduction)
    check(x, weight, targets, bias, class_weight, options)
    autocast = None if x.dtype == torch.float64 else modes.autocast_dtype(x.device.type)
    recorded = torch.is_grad_enabled()
    x_grad, weight_grad, bias_grad = (
        recorded and t is not None and t.requires_grad for t in (x, weight, bias)
    )
    return LinearLossProblem(
        x_shape=x.shape,
        classes=weight.shape[0],
        dtype=x.dtype if autocast is None else autocast,
        device=x.device,
        has_bias=bias is not None,
        class_weight_dtype=None if class_weight is None else class_weight.dtype,
        options=options,
        autocast=autocast is not None,
        needs_grad=x_grad or weight_grad or bias_grad,
        needs=(x_grad, weight_grad, bias_grad),
        transformed=modes.transformed(),
    )


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    options: Options,
) -> None:
    """Raise for whatever the caller got wrong; the only place of the op that does."""
    check_floating("x", x, BY_ROWS)
    if x.dim() == 0:
        raise ValueError("x must have the shape (..., D); got a tensor without dimensions")
    check_floating("weight", weight, BY_ROWS, ("x", x))
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have the shape (V, D) with at least one class; got {tuple(weight.shape)}"
        )
    if weight.shape[1] != x.shape[-1]:
        fix = "; weight.t() fits" if weight.shape[0] == x.shape[-1] else ""
        raise ValueError(
            f"weight must have the shape (V, D) with D = {x.shape[-1]}, the last size of x "
            f"{tuple(x.shape)}; got {tuple(weight.shape)}{fix}"
        )
    if bias is not None:
        check_floating("bias", bias, BY_ROWS, ("x", x))
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"bias must have the shape (V,) = ({weight.shape[0]},), or be None; "
                f"got {tuple(bias.shape)}"
            )
    one_dtype = modes.autocast_dtype(x.device.type) is None or x.dtype == torch.float64
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == x.dtype:
            continue
        if one_dtype or tensor.dtype == torch.float64:
            raise TypeError(
                f"x, weight and bias must have one dtype; got x {dtype_name(x.dtype)}, {name} "
                f"{dtype_name(tensor.dtype)}: cast them to the same"
            )
    check_targets(targets, x, "x")
    check_class_weight("class_weight", class_weight, weight.shape[0], x, "x")
    check_options(options)
