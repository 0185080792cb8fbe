"""Layers for Hugging Face's `kernels`: forwards that it puts on modules of other classes.

`self` is the module, with the attributes of its own class. Such a layer may have no state, no
constructor and no other method. Where ours would not do the same (inputs of another dtype than the
weight, hooks or adapters on a part, an activation that `fastattn.ffn` does not have) the forward of
the module's class runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import nn
from fastattn.integrations.hypotheses import feed_forward
from fastattn.integrations.hypotheses.norm import Norm, NormSwap
from fastattn.ops.ffn import ffn

# The classes of transformers.activations, by name: transformers itself is not needed here.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
}
# Made once: torch.compile of torch 2.11 makes none.
_RMS_NORMS = {
    (eps, offset): Norm(False, "weight", None, offset, eps)
    for eps in ("variance_epsilon", "eps")
    for offset in (0, 1)
}


class LayerNorm(torch.nn.Module):
    """For `torch.nn.LayerNorm`: input (..., *normalized_shape) -> the same."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        if input.is_nested:
            return _original(module, input)
        return nn.LayerNorm.forward(module, input)


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, where eps is `variance_epsilon` or `eps`."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _rms_norm(self, hidden_states, offset=0)


class RMSNormZeroCentered(torch.nn.Module):
    """The same with 1 + weight."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _rms_norm(self, hidden_states, offset=1)


class SwiGLUMLP(torch.nn.Module):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)); (..., width) -> the same."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _ffn(self, x, "gate_proj", "up_proj", "down_proj", "act_fn")


class GeGLUMLP(SwiGLUMLP):
    """The same: the module's `act_fn` says which activation it is."""


class GPT2MLP(torch.nn.Module):
    """dropout(c_proj(act(c_fc(x)))), of GPT-2's Conv1D."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _ffn(self, hidden_states, None, "c_fc", "c_proj", "act", "conv1d", "dropout")


class MLP(torch.nn.Module):
    """fc2(activation_fn(fc1(x))), as CLIP and SigLIP have it."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _ffn(self, hidden_states, None, "fc1", "fc2", "activation_fn")


def _original(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The forward of the module's class, which the instance's hides."""
    out: Tensor = type(module).forward(module, x)
    return out


def _rms_norm(module: Any, x: Tensor, offset: int) -> Tensor:
    eps = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
    if not hasattr(module, eps) or not NormSwap._suits(module, x):
        return _original(module, x)
    return _RMS_NORMS[eps, offset](module, x)


def _ffn(
    module: torch.nn.Module,
    x: Tensor,
    gate: str | None,
    fc1: str,
    fc2: str,
    act: str,
    layout: str = "linear",
    dropout: str | None = None,
) -> Tensor:
    function = getattr(module, act)
    bound = feed_forward.FeedForward(
        gate, fc1, fc2, None, layout, _activation(function), act, type(function), dropout, ()
    )
    if feed_forward.recogniser(bound).refusal(module) is not None:
        return _original(module, x)
    out: Tensor = ffn(**bound.arguments(module, x))
    return out if dropout is None else module.get_submodule(dropout)(out)


def _activation(function: Any) -> str | None:
    """Its name in `fastattn.ffn`, None if it has none."""
    cls = type(function)
    if cls is torch.nn.SiLU:
        return "silu"
    if cls is torch.nn.ReLU:
        return "relu"
    if cls is torch.nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    if cls.__module__ == "transformers.activations":
        return _ACTIVATIONS.get(cls.__name__)
    return None
