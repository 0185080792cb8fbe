"""A call of linear apart from its data, and every error that a user can make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.activations import check_activation
from fastattn.ops.common.dense import dtype_name
from fastattn.ops.common.factors import check_factors


@dataclass(frozen=True)
class LinearProblem:
    """Metadata of one call; `check` has passed before a backend sees it."""

    x_shape: tuple[int, ...]  # (..., in_features)
    out_features: int
    dtype: torch.dtype  # of the computation and the result: autocast's, where autocast is on
    device: torch.device
    activation: str | None
    has_bias: bool
    autocast: bool
    needs_grad: bool
    transformed: bool

    op = "linear"

    @property
    def elements(self) -> int:
        """The problem's size where backends are compared (measured.py): its multiplications."""
        return math.prod(self.x_shape) * self.out_features

    def describe(self) -> str:
        features = [
            "no bias" if not self.has_bias else "",
            "under autocast" if self.autocast else "",
            "with gradients" if self.needs_grad else "",
            "under a torch.func transform or forward-mode AD" if self.transformed else "",
        ]
        sizes = f"x {tuple(self.x_shape)}, out_features {self.out_features}"
        kind = f"{self.activation or 'no activation'}, {dtype_name(self.dtype)} on {self.device}"
        return ", ".join([sizes, kind, *filter(None, features)])


def describe(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> LinearProblem:
    """The problem of a call. Raises TypeError or ValueError for every error of the caller."""
    check(x, weight, bias, activation)
    autocast = modes.autocast_dtype(x.device.type)
    if x.dtype == torch.float64:  # autocast leaves float64 alone
        autocast = None
    return LinearProblem(
        x_shape=x.shape,
        out_features=weight.shape[0],
        dtype=x.dtype if autocast is None else autocast,
        device=x.device,
        activation=activation,
        has_bias=bias is not None,
        autocast=autocast is not None,
        needs_grad=modes.needs_grad(x, weight, bias),
        transformed=modes.transformed(),
    )


def check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> None:
    """Raise for whatever the caller got wrong; the only place of the op that does."""
    if activation is not None:
        check_activation(activation, " or None")
    check_factors({"x": x, "weight": weight, "bias": bias}, ("bias",))
    if x.dim() == 0:
        raise ValueError(
            "x must have the shape (..., in_features); got a tensor without dimensions"
        )
    in_features = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != in_features:
        fits = weight.dim() == 2 and weight.shape[0] == in_features
        fix = "; weight.t() fits" if fits else ""
        raise ValueError(
            f"weight must be (out_features, in_features) with in_features = {in_features}, the "
            f"last size of x {tuple(x.shape)}; got {tuple(weight.shape)}{fix}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have the shape (out_features,) = ({weight.shape[0]},), or be None; "
            f"got {tuple(bias.shape)}"
        )
