"""A call of cross_entropy apart from its data, and every error that a user can make.

`linear_cross_entropy` has the same options and the same targets: it asks here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.dense import BY_ROWS, check_dense, check_floating, dtype_name

IGNORED = -100  # a target that counts for nothing

TARGETS = (torch.int64, torch.int32)
REDUCTIONS = ("none", "mean", "sum")


class Options(NamedTuple):
    """What a loss is beside its tensors."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float
    reduction: str

    @classmethod
    def of_operator(cls, settings: Sequence[Any]) -> Options:
        """Those of a registered operator, which has all but a reduction."""
        return cls._make((*settings, "none"))

    def describe(self) -> str:
        plain = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_scale": 1.0, "softcap": 0.0}
        given = {name: getattr(self, name) for name in plain}
        told = [f"{name} {value:g}" for name, value in given.items() if value != plain[name]]
        return ", ".join([f"reduction {self.reduction}", *told])


@dataclass(frozen=True)
class LossProblem:
    """Metadata of one call, checked."""

    shape: tuple[int, ...]  # (..., V), of the logits
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    device: torch.device
    options: Options
    needs_grad: bool
    transformed: bool

    op = "cross_entropy"

    @property
    def elements(self) -> int:
        """The problem's size where backends are compared (measured.py): the logits."""
        return math.prod(self.shape)

    def describe(self) -> str:
        weight = "" if self.weight_dtype is None else f"weight {dtype_name(self.weight_dtype)}"
        facts = [
            f"logits {tuple(self.shape)} {dtype_name(self.dtype)}",
            weight,
            self.options.describe(),
            "under a torch.func transform or forward-mode AD" if self.transformed else "",
            f"on {self.device}",
        ]
        return ", ".join(filter(None, facts))


def describe(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> LossProblem:
    """The problem of a call. Raises TypeError or ValueError for every error of the caller."""
    options = Options(ignore_index, label_smoothing, z_loss, logit_scale, softcap, reduction)
    check_floating("logits", logits, BY_ROWS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            "logits must have the shape (..., V) with at least one class; "
            f"got {tuple(logits.shape)}"
        )
    check_targets(targets, logits, "logits")
    check_class_weight("weight", weight, logits.shape[-1], logits, "logits")
    check_options(options)
    return LossProblem(
        shape=logits.shape,
        dtype=logits.dtype,
        weight_dtype=None if weight is None else weight.dtype,
        device=logits.device,
        options=options,
        needs_grad=modes.needs_grad(logits),
        transformed=modes.transformed(),
    )


def check_targets(targets: torch.Tensor, of: torch.Tensor, name: str) -> None:
    """That the targets are one class for each row of the argument `name`."""
    check_dense("targets", targets, BY_ROWS)
    if targets.is_floating_point():
        raise TypeError(
            "targets must be classes, int64 or int32; got "
            f"{dtype_name(targets.dtype)}: for probabilities call torch.nn.functional.cross_entropy"
        )
    if targets.dtype not in TARGETS:
        raise TypeError(
            f"targets must be int64 or int32; got {dtype_name(targets.dtype)}: call targets.long()"
        )
    if targets.shape != of.shape[:-1]:
        raise ValueError(
            f"targets must have the shape {tuple(of.shape[:-1])} of {name} "
            f"{tuple(of.shape)} without its last dimension; got {tuple(targets.shape)}"
        )
    if targets.device != of.device:
        raise ValueError(
            f"targets must be on the device of {name}, {of.device}; got {targets.device}: move them"
        )


def check_class_weight(
    name: str, weight: torch.Tensor | None, classes: int, of: torch.Tensor, of_name: str
) -> None:
    """That the weight of the classes, if any, is one number for each, without a gradient."""
    if weight is None:
        return
    check_floating(name, weight, BY_ROWS, (of_name, of))
    if tuple(weight.shape) != (classes,):
        raise ValueError(
            f"{name} must have the shape (V,) = ({classes},), one number for each class; "
            f"got {tuple(weight.shape)}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} has no gradient here: give {name}.detach()")


def check_options(options: Options) -> None:
    if options.reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; "
            f"got {options.reduction!r}"
        )
    if not isinstance(options.ignore_index, int) or isinstance(options.ignore_index, bool):
        raise TypeError(f"ignore_index must be an int; got {type(options.ignore_index).__name__}")
    for name in ("label_smoothing", "z_loss", "logit_scale", "softcap"):
        value = getattr(options, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a float; got {type(value).__name__}")
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite; got {value}")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1; got {options.label_smoothing}")
    for name in ("z_loss", "softcap"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} must not be negative; got {getattr(options, name)}")


def check_classes(targets: torch.Tensor, ignore_index: int, classes: int) -> None:
    """That all targets are in [0, classes) or ignored, where the host may read them for nothing.

    It reads values, which a plan cannot have, so every call asks; on a GPU it would wait.

    Raises IndexError, as torch.nn.functional.cross_entropy does on a CPU.
    """
    if not targets.is_cpu or not modes.readable(targets) or not targets.numel():
        return
    counted = targets.masked_fill(targets == ignore_index, 0)
    least, most = (int(x) for x in counted.aminmax())
    if least < 0 or most >= classes:
        wrong = least if least < 0 else most
        raise IndexError(
            f"targets must be classes from 0 to {classes - 1}, or ignore_index = {ignore_index}; "
            f"got {wrong}"
        )
