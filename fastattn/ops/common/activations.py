"""The activations that ops have: their definitions, and as ATen computes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")


def check_activation(activation: object, otherwise: str = "") -> None:
    """Raise ValueError unless `activation` is the name of one.

    `otherwise` says what else the argument may be, e.g. " or None".
    """
    if activation not in ACTIVATIONS:
        accepted = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be one of {accepted}{otherwise}; got {activation!r}")


def activate(activation: str, functional: bool, pre: torch.Tensor) -> torch.Tensor:
    """activation(pre), in place where `pre` is not needed again, unless `functional`."""
    in_place = not (functional or pre.requires_grad)
    if activation == "gelu_tanh" or activation == "gelu":
        gelu = torch._C._nn.gelu_ if in_place else F.gelu  # type: ignore[attr-defined]
        return gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "relu":
        return F.relu(pre) if functional else F.relu_(pre)
    return F.silu(pre, inplace=in_place)


# --- definitions ---------------------------------------------------------------------------------


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """x P(X <= x) for a standard normal X (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The approximation of the same paper, which GPT-2 uses."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x <= 0.0, 0.0, x)  # NaN stays NaN


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


DEFINITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
}
