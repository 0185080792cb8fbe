"""The activations that ops have, as ATen computes them."""

from __future__ import annotations

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
