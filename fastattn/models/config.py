"""The configuration of a GPT."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.models.checked import Checked
from fastattn.nn.attention import QK_NORMS
from fastattn.nn.checks import check_choice, check_number
from fastattn.nn.transformer_block import NORMS, PLACEMENTS

# Names of activation functions in Hugging Face's configs -> names in fastattn.ffn.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

POSITIONS = ("learned", "rotary")

# Fields that must be above 0.
POSITIVE = (
    "layer_norm_epsilon", "initializer_range", "rope_theta", "rope_local_theta",
    "partial_rotary_factor", "attention_scale", "embedding_scale",
)  # fmt: skip

PRESETS: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M parameters
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


@dataclass(frozen=True)
class GPTConfig(Checked):
    """Size and settings of a `GPT`, GPT-2's by the names of Hugging Face's `GPT2Config`.

    The defaults are GPT-2 124M's, but for dropout, which is 0 here and 0.1 there. The fields from
    ``n_kv_head`` on make other families of it: a Llama has ``norm="rms_norm"``,
    ``positions="rotary"``, ``gated=True``, ``activation_function="silu"`` and no biases.

    Attributes:
        vocab_size: number of token ids.
        n_positions: longest sequence. Learned positions have nothing beyond it.
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
        n_kv_head: number of key and value heads; must divide n_head; None is n_head.
        head_size: size of a head; None is n_embd / n_head.
        norm: "layer_norm", "rms_norm", or "offset_rms_norm", which multiplies by 1 + weight.
        norm_placement: "pre", "post", "output" or "both" (`fastattn.nn.TransformerBlock`).
        qk_norm: RMSNorm of queries and keys: of each "head", of "all" heads together, or None.
        positions: "learned", or "rotary".
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are scaled (`fastattn.nn.RotaryEmbedding`); a mapping, kept as a
            tuple of pairs.
        rope_local_theta: base for the layers with "sliding_attention", which then are not scaled;
            None: as the others.
        partial_rotary_factor: share of a head that turns.
        gated: whether the feed-forward has a gate (SwiGLU, GeGLU).
        qkv_bias, out_bias, mlp_bias, head_bias: whether these linear layers have a bias.
        sliding_window: how many positions a query of "sliding_attention" sees, itself included.
        layer_types: "full_attention" or "sliding_attention" a layer; None: sliding in all if there
            is a sliding_window.
        attention_scale: factor of the scores, in place of what scale_attn_weights says.
        attn_logit_softcapping, final_logit_softcapping: caps of scores and logits; 0: none.
        embedding_scale: factor of the token embeddings.

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
    n_kv_head: int | None = None
    head_size: int | None = None
    norm: str = "layer_norm"
    norm_placement: str = "pre"
    qk_norm: str | None = None
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | tuple[tuple[str, Any], ...] | None = None
    rope_local_theta: float | None = None
    partial_rotary_factor: float = 1.0
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attention_scale: float | None = None
    attn_logit_softcapping: float = 0.0
    final_logit_softcapping: float = 0.0
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        self._settle_integers(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), 1)
        optional = ("n_inner", "n_kv_head", "head_size", "sliding_window")
        self._settle_integers(optional, 1, optional=True)
        self._settle_integers(("bos_token_id", "pad_token_id"), optional=True)
        self._settle_ends()
        self._settle_probabilities(("embd_pdrop", "attn_pdrop", "resid_pdrop"))
        self._settle_positive(POSITIVE, optional=("rope_local_theta", "attention_scale"))
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            self._settle(name, check_number(name, getattr(self, name) or 0.0))
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or positive, got {getattr(self, name)}")
        self._check_flags()
        if self.head_size is None:
            self._check_divides("n_head", "n_embd")
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"n_kv_head must divide n_head, got n_kv_head={self.n_kv_head} and "
                f"n_head={self.n_head}"
            )
        self._check_choices(
            activation_function=ACTIVATIONS, norm=NORMS, norm_placement=PLACEMENTS,
            qk_norm=QK_NORMS, positions=POSITIONS,
        )  # fmt: skip
        self._settle_scaling()
        if self.positions == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                "partial_rotary_factor must leave an even number of a head's "
                f"{self.head_dim} elements, got {self.partial_rotary_factor}"
            )
        self._settle_layer_types(self.n_layer, "sliding_window")

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
        check_choice("name", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    @property
    def feedforward_dim(self) -> int:
        """Size of the feed-forward's hidden layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head turn."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def short_positions(self) -> int | None:
        """The longest sequence that "longrope" turns by its short factors; None where none passes.

        The keys in a cache have been turned: a sequence there stays on its side of this length.
        """
        scaling = dict(self.rope_scaling or ()) if self.positions == "rotary" else {}
        if scaling.get("rope_type") != "longrope":
            return None
        first = int(scaling["original_max_position_embeddings"])
        return first if first < self.n_positions else None

    def resolved(self) -> GPTConfig:
        """The same model's config with each default and each name of several said in one way."""
        types = tuple(self.layer_type(layer) for layer in range(self.n_layer))
        slides = "sliding_attention" in types
        plain = dataclasses.replace(self, scale_attn_by_inverse_layer_idx=False)
        changes: dict[str, Any] = {
            "n_inner": self.feedforward_dim,
            "n_kv_head": self.kv_heads,
            "head_size": self.head_dim,
            "activation_function": ACTIVATIONS[self.activation_function],
            "scale_attn_weights": True,
            "attention_scale": plain.softmax_scale(0),
            "layer_types": types,
            "sliding_window": self.sliding_window if slides else None,
            "rope_scaling": None if self.rope_scaling is None else tuple(sorted(self.rope_scaling)),
        }
        if changes["activation_function"] == "gelu_tanh":
            changes["activation_function"] = "gelu_new"
        if self.positions != "rotary":
            changes |= {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 1.0}
        same = (self.rope_local_theta, None) == (self.rope_theta, self.rope_scaling)
        if self.positions != "rotary" or not slides or same:
            changes["rope_local_theta"] = None
        return dataclasses.replace(self, **changes)

    def layer_type(self, layer: int) -> str:
        """ "full_attention" or "sliding_attention"."""
        if self.layer_types is not None:
            return self.layer_types[layer]
        return "full_attention" if self.sliding_window is None else "sliding_attention"

    def window(self, layer: int) -> tuple[int, int] | None:
        """The keys that a query of ``layer`` sees to either side, None for all."""
        if self.layer_type(layer) == "full_attention" or self.sliding_window is None:
            return None
        return self.sliding_window - 1, 0

    def softmax_scale(self, layer: int) -> float:
        """Factor of the attention scores in ``layer`` (from 0)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        if self.attention_scale is not None:
            scale = self.attention_scale
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale
