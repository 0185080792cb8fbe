"""The feed-forward part of a transformer as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.checks import check_choice, check_positive, check_probability
from fastattn.nn.plain import is_plain
from fastattn.ops.ffn import ffn

# The activations of `fastattn.ffn`, for children that must run as modules.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(torch.nn.Module):
    """Two linear layers with an activation between, on `fastattn.ffn`: one fused op.

        dropout(linear2(activation(linear1(x))))
        dropout(linear2(activation(gate(x)) * linear1(x)))      gated: SwiGLU with "silu"

    With ``activation_dropout`` what linear2 reads is dropped first, which makes it two ops.

    ``linear1``, ``linear2`` and ``gate`` are `torch.nn.Linear`, initialised as such, and so
    ``state_dict`` has their weights and biases: ``linear1.weight``, ``gate.weight`` (both
    feedforward_dim x embed_dim), ``linear2.weight`` (embed_dim x feedforward_dim). In a Llama they
    are called ``up_proj``, ``gate_proj`` and ``down_proj``.

    The weights go to the op without a call of the modules. Where that could be noticed (see
    `fastattn.nn.plain.is_plain`: hooks, LoRA and other wrappers, parametrisations, weights of a
    tensor subclass or sparse), all are called as modules, with the activation between;
    ``recompute`` then saves nothing. The same holds for a nested tensor.

    Args:
        embed_dim: size of the last dimension of input and output.
        feedforward_dim: size of the hidden layer; default ``4 * embed_dim``.
        activation: "gelu_tanh", "gelu" (by erf), "relu" or "silu".
        bias: whether the linear layers have one.
        dropout: probability with which an element of the output is dropped in training.
        activation_dropout: the same for the hidden layer.
        gated: whether there is a third linear layer, ``gate``, whose activated result multiplies
            that of ``linear1``. At the same number of weights feedforward_dim is 2/3 as large.
        recompute: keep only the input for backward and compute the hidden layer again, where False
            also keeps the hidden layer before its activation, and the gate's.

    Raises:
        TypeError: a size is no integer, or dropout no number.
        ValueError: a size is not positive, an unknown activation, dropout outside [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        feedforward_dim: int | None = None,
        activation: str = "gelu_tanh",
        *,
        bias: bool = True,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        gated: bool = False,
        recompute: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("embed_dim", embed_dim)
        feedforward_dim = 4 * embed_dim if feedforward_dim is None else feedforward_dim
        check_positive("feedforward_dim", feedforward_dim)
        check_probability("dropout", dropout)
        self.activation_dropout = check_probability("activation_dropout", activation_dropout)
        check_choice("activation", activation, ACTIVATIONS)
        self.embed_dim = embed_dim
        self.feedforward_dim = feedforward_dim
        self.activation = activation
        self.recompute = recompute
        self.linear1 = torch.nn.Linear(embed_dim, feedforward_dim, bias, device, dtype)
        self.linear2 = torch.nn.Linear(feedforward_dim, embed_dim, bias, device, dtype)
        into = embed_dim, feedforward_dim, bias, device, dtype
        self.gate = torch.nn.Linear(*into) if gated else None
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., embed_dim), in x's dtype (under autocast: in autocast's)."""
        return self.dropout(self.branch(x))

    def branch(self, x: Tensor) -> Tensor:
        """`forward` before the dropout of its result."""
        gate = self.gate
        layers = (
            (self.linear1, self.linear2) if gate is None else (self.linear1, self.linear2, gate)
        )
        dropped = self.training and self.activation_dropout > 0
        plain = all(is_plain(layer, torch.nn.Linear) for layer in layers)
        if plain and not x.is_nested and not dropped:
            return ffn(
                x,
                self.linear1.weight,
                self.linear1.bias,
                self.linear2.weight,
                self.linear2.bias,
                self.activation,
                gate=None if gate is None else gate.weight,
                gate_bias=None if gate is None else gate.bias,
                layout="linear",
                recompute=self.recompute,
            )
        activation, hidden = ACTIVATIONS[self.activation], self.linear1(x)
        hidden = activation(hidden) if gate is None else activation(gate(x)) * hidden
        return self.linear2(F.dropout(hidden, self.activation_dropout, self.training))

    def extra_repr(self) -> str:
        gated = "" if self.gate is None else ", gated=True"
        return f"activation={self.activation!r}{gated}, recompute={self.recompute}"
