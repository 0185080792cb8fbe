"""A call of a norm apart from its data, and every error that a user can make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.dense import BY_ROWS, check_floating, dtype_name


@dataclass(frozen=True)
class NormProblem:
    """Metadata of one call of `layer_norm` (`center`) or `rms_norm`, checked."""

    shape: tuple[int, ...]  # (..., hidden), of x and residual
    dtype: torch.dtype  # of x
    residual_dtype: torch.dtype | None
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    stream_dtype: torch.dtype  # of what is normalised: x, or dropout(x) + residual
    out_dtype: torch.dtype
    device: torch.device
    center: bool
    eps: float
    dropout_p: float
    transformed: bool

    @property
    def op(self) -> str:
        return "layer_norm" if self.center else "rms_norm"

    @property
    def elements(self) -> int | None:
        """The problem's size where backends are compared (measured.py): x's elements.

        None with dropout, which is not compared.
        """
        return None if self.dropout_p else math.prod(self.shape)

    @property
    def needs_grad(self) -> None:
        """Not known: a plan serves calls with and without gradients."""
        return None

    @property
    def hidden(self) -> int:
        return self.shape[-1]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        given = (self.dtype, self.residual_dtype, self.weight_dtype, self.bias_dtype)
        return tuple(dtype for dtype in given if dtype is not None)

    def describe(self) -> str:
        facts = [f"x {tuple(self.shape)} {dtype_name(self.dtype)}"]
        for name, dtype in (
            ("weight", self.weight_dtype),
            ("bias", self.bias_dtype),
            ("residual", self.residual_dtype),
        ):
            if dtype is not None:
                facts.append(f"{name} {dtype_name(dtype)}")
        if self.dropout_p:
            facts.append(f"dropout_p={self.dropout_p}")
        if self.out_dtype != self.stream_dtype:
            facts.append(f"out {dtype_name(self.out_dtype)} under autocast")
        if self.transformed:
            facts.append("under a torch.func transform or forward-mode AD")
        return f"{', '.join(facts)}, on {self.device}"


def describe_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> NormProblem:
    """The problem of a call of `layer_norm`. Raises TypeError or ValueError."""
    return describe(x, weight, bias, eps, residual, dropout_p, center=True)


def describe_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    residual: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> NormProblem:
    """The problem of a call of `rms_norm`. Raises TypeError or ValueError."""
    return describe(x, weight, None, eps, residual, dropout_p, center=False)


def describe(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    dropout_p: float = 0.0,
    *,
    center: bool,
) -> NormProblem:
    """The problem of a call. Raises TypeError or ValueError for every error of the caller."""
    check(x, weight, bias, eps, residual, dropout_p, center)
    stream_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out_dtype = stream_dtype
    # Autocast runs the norms in float32 on every accelerator and leaves them alone on the CPU.
    if x.device.type != "cpu" and modes.autocast_enabled(x.device.type):
        out_dtype = torch.promote_types(stream_dtype, torch.float32)
    if eps is None:
        # The dtype of the statistics decides, as in ATen: float32's for 16-bit inputs.
        eps = torch.finfo(torch.promote_types(out_dtype, torch.float32)).eps
    return NormProblem(
        shape=x.shape,
        dtype=x.dtype,
        residual_dtype=None if residual is None else residual.dtype,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        stream_dtype=stream_dtype,
        out_dtype=out_dtype,
        device=x.device,
        center=center,
        eps=float(eps),
        dropout_p=float(dropout_p),
        transformed=modes.transformed(),
    )


def check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    dropout_p: float,
    center: bool,
) -> None:
    """Raise for whatever the caller got wrong; the only place of the op that does."""
    check_floating("x", x, BY_ROWS)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension (..., hidden); got a 0-dim tensor")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        check_floating(name, parameter, BY_ROWS, ("x", x))
        if parameter.dim() != 1 or parameter.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{name} must have the shape (hidden,) = ({x.shape[-1]},) of x's last dimension; "
                f"got {tuple(parameter.shape)}"
            )
    if residual is not None:
        check_floating("residual", residual, BY_ROWS, ("x", x))
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have x's shape {tuple(x.shape)}; got {tuple(residual.shape)}"
            )
    check_dropout(dropout_p, residual)
    if eps is None and not center:
        return
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float; got {type(eps).__name__}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative; got {eps}")


def check_dropout(dropout_p: float, residual: torch.Tensor | None) -> None:
    """Raise unless `dropout_p` is a probability, and 0 without a residual."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float; got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1); got {dropout_p}")
    if dropout_p and residual is None:
        raise ValueError(
            f"dropout_p={dropout_p} drops elements of x before they are added to a residual; got "
            "residual=None: give a residual, or normalise torch.nn.functional.dropout(x, dropout_p)"
        )
