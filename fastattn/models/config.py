"""The configuration of a GPT."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastattn.nn.checks import check_integer, check_number, check_probability

# Names of activation functions in Hugging Face's configs -> names in fastattn.ffn.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

PRESETS: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


@dataclass(frozen=True)
class GPTConfig:
    """Size and settings of a `GPT`, by the names of Hugging Face's `GPT2Config`.

    The defaults are GPT-2 124M's, but for dropout, which is 0 here and 0.1 there.

    Attributes:
        vocab_size: number of token ids.
        n_positions: longest sequence; positions are learned, so there is nothing beyond it.
        n_embd: size of the residual stream.
        n_layer: number of blocks.
        n_head: number of attention heads; must divide n_embd.
        n_inner: size of the feed-forward's hidden layer; None is 4 * n_embd.
        activation_function: "gelu_new" (or "gelu_pytorch_tanh", the same), "gelu" (by erf), "relu",
            "silu" (or "swish").
        embd_pdrop, attn_pdrop, resid_pdrop: dropout of embeddings, attention weights and the
            branches' outputs.
        layer_norm_epsilon: eps of all norms.
        initializer_range: standard deviation of new weights.
        bos_token_id, eos_token_id, pad_token_id: special tokens, which generation and other readers
            of the saved config use. eos may be several. Unlike arguments of `generate`, they may
            lie outside of the vocabulary (as GPT-2's do where only vocab_size was changed).
        scale_attn_weights: whether scores are divided by sqrt(n_embd / n_head).
        scale_attn_by_inverse_layer_idx: whether layer i (from 0) divides them by i + 1 too.
        reorder_and_upcast_attn: kept for other readers of the saved config. It asks for scores in
            float32, which is how all our kernels compute them.
        tie_word_embeddings: whether the head shares the token embedding's weight.

    Raises:
        TypeError: a field has another type.
        ValueError: a field's value makes no model; the message names it.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            settle(name, check_integer(name, getattr(self, name), at_least=1))
        if self.n_inner is not None:
            inner = check_integer("n_inner", self.n_inner, at_least=1, otherwise=" or None")
            settle("n_inner", inner)
        for name in ("bos_token_id", "pad_token_id"):
            if (token := getattr(self, name)) is not None:
                settle(name, check_integer(name, token, otherwise=" or None"))
        ends = self.eos_token_id
        if isinstance(ends, (list, tuple)):  # a tuple is hashable
            settle("eos_token_id", tuple(check_integer("each eos_token_id", end) for end in ends))
        elif ends is not None:
            settle(
                "eos_token_id", check_integer("eos_token_id", ends, otherwise=", several or None")
            )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            settle(name, check_probability(name, getattr(self, name)))
        for name in ("layer_norm_epsilon", "initializer_range"):
            settle(name, check_number(name, getattr(self, name)))
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise TypeError(
                    f"{field.name} must be True or False, got {getattr(self, field.name)!r}"
                )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head must divide n_embd, got n_head={self.n_head} and n_embd={self.n_embd}"
            )
        if self.activation_function not in tuple(ACTIVATIONS):
            raise ValueError(
                f"activation_function must be one of {', '.join(map(repr, ACTIVATIONS))}, "
                f"got {self.activation_function!r}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """One of GPT-2's published sizes, with ``changes`` to single fields.

        >>> GPTConfig.preset("gpt2-medium", resid_pdrop=0.1).n_layer
        24

        Args:
            name: "gpt2" (124M parameters), "gpt2-medium" (355M), "gpt2-large" (774M) or
                "gpt2-xl" (1558M).
            changes: fields of `GPTConfig`.

        Raises:
            ValueError: an unknown name, or changes that make no model.
            TypeError: a change that is no field.
        """
        if name not in tuple(PRESETS):
            raise ValueError(f"name must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def feedforward_dim(self) -> int:
        """Size of the feed-forward's hidden layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def softmax_scale(self, layer: int) -> float:
        """Factor of the attention scores in ``layer`` (from 0)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale
