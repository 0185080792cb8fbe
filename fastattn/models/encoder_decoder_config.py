"""The configuration of an encoder-decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastattn.models.checked import Checked
from fastattn.models.config import ACTIVATIONS
from fastattn.nn.checks import check_choice

POSITIONS = ("sinusoidal", "learned", "relative")
PLACEMENTS = ("pre", "post")

SIZES = (
    "vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads",
    "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim",
)  # fmt: skip
TOKENS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
# Fields that must be above 0, or, but for two of them, None.
POSITIVE = (
    "layer_norm_epsilon", "embedding_scale", "attention_scale", "logits_scale", "initializer_range",
)  # fmt: skip


def _sizes(d_model: int, layers: int, heads: int, ffn: int, **others: Any) -> dict[str, Any]:
    return {
        "d_model": d_model,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": ffn,
        "decoder_ffn_dim": ffn,
        **others,
    }


T5: dict[str, Any] = {
    "vocab_size": 32128, "n_positions": None, "positions": "relative", "norm": "rms_norm",
    "norm_placement": "pre", "layer_norm_epsilon": 1e-6, "bias": False, "attention_scale": 1.0,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
T5_V1_1: dict[str, Any] = {
    **T5, "gated": True, "activation_function": "gelu_new", "tie_word_embeddings": False,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 50265, "n_positions": 1024, "positions": "learned", "position_offset": 2,
    "activation_function": "gelu", "embedding_norm": True, "logits_bias": True,
    "frozen_padding": True, "initializer_range": 0.02, "bos_token_id": 0, "pad_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip

# The vocabulary of English to German. What the decoder reads first is a vector of zeros, and the
# head's bias stays zero: it makes a Marian of it, which can be saved.
TRANSFORMER: dict[str, Any] = {"vocab_size": 37000, "frozen_padding": True, "logits_bias": True}

PRESETS: dict[str, dict[str, Any]] = {
    # Vaswani et al. 2017, table 3
    "transformer-base": _sizes(512, 6, 8, 2048, embedding_scale=512**0.5, **TRANSFORMER),
    "transformer-big": _sizes(1024, 6, 16, 4096, embedding_scale=32.0, **TRANSFORMER),
    # Raffel et al. 2020, and its second edition with GeGLU
    "t5-small": _sizes(512, 6, 8, 2048, logits_scale=512**-0.5, **T5),
    "t5-base": _sizes(768, 12, 12, 3072, logits_scale=768**-0.5, **T5),
    "t5-large": _sizes(1024, 24, 16, 4096, logits_scale=1 / 32, **T5),
    "t5-v1_1-small": _sizes(512, 8, 6, 1024, head_size=64, **T5_V1_1),
    "t5-v1_1-base": _sizes(768, 12, 12, 2048, **T5_V1_1),
    "t5-v1_1-large": _sizes(1024, 24, 16, 2816, **T5_V1_1),
    # Lewis et al. 2020
    "bart-base": _sizes(768, 6, 12, 3072, **BART),
    "bart-large": _sizes(1024, 12, 16, 4096, **BART),
}


@dataclass(frozen=True)
class EncoderDecoderConfig(Checked):
    """Size and settings of an `EncoderDecoder`; BART's names, where BART has the field.

    The defaults are the base model of Vaswani et al. 2017 (arXiv:1706.03762), but for dropout,
    which is 0 here, and the scale of its embeddings: ``preset("transformer-base")`` has it.

    Attributes:
        vocab_size: number of token ids, of both sides.
        n_positions: longest sequence of either side; None for no limit, which only relative
            positions have.
        d_model: size of the residual streams.
        encoder_layers, decoder_layers: number of blocks.
        encoder_attention_heads, decoder_attention_heads: number of heads; must divide d_model,
            unless there is a head_size.
        encoder_ffn_dim, decoder_ffn_dim: size of the feed-forward's hidden layer.
        head_size: size of a head; None is d_model / heads.
        activation_function: as `GPTConfig`'s.
        gated: whether the feed-forward has a gate.
        norm: "layer_norm" or "rms_norm".
        norm_placement: "post" (Vaswani et al., BART), or "pre", with a norm at the end of each
            side (T5).
        layer_norm_epsilon: eps of all norms.
        embedding_norm: whether the sum of the embeddings is normalised.
        positions: "sinusoidal", "learned", or "relative" (T5's bias of the scores).
        position_offset: number of unused rows before the learned positions.
        relative_buckets, relative_max_distance: `fastattn.nn.RelativePositionBias`'s.
        bias: whether linear layers, other than the head, and LayerNorms have one.
        logits_bias: whether the head has one, which is not trained.
        embedding_scale: factor of the token embeddings.
        attention_scale: factor of the scores; None is 1 / sqrt(size of a head).
        logits_scale: factor of what the head reads.
        tie_word_embeddings: whether the head shares the token embedding's weight.
        frozen_padding: whether the embedding of pad_token_id gets no gradient as an input.
        dropout, attention_dropout, activation_dropout: of embeddings, branches and final norms; of
            attention weights; of the feed-forward's hidden layer.
        initializer_range: standard deviation of new weights. None: whatever keeps the variances.
        bos_token_id, eos_token_id, pad_token_id: special tokens or None; eos may be several.
        decoder_start_token_id: the first token that the decoder reads.

    Raises:
        TypeError: a field has another type.
        ValueError: a field's value makes no model; the message names it.
    """

    vocab_size: int = 32000
    n_positions: int | None = 512
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    head_size: int | None = None
    activation_function: str = "relu"
    gated: bool = False
    norm: str = "layer_norm"
    norm_placement: str = "post"
    layer_norm_epsilon: float = 1e-5
    embedding_norm: bool = False
    positions: str = "sinusoidal"
    position_offset: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    bias: bool = True
    logits_bias: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    logits_scale: float = 1.0
    tie_word_embeddings: bool = True
    frozen_padding: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    initializer_range: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    decoder_start_token_id: int | None = 0

    is_encoder_decoder = True  # for `fastattn.generation`; no field

    def __post_init__(self) -> None:
        self._settle_integers(SIZES, 1)
        self._settle_integers(("n_positions", "head_size"), 1, optional=True)
        self._settle_integers(TOKENS, optional=True)
        self._settle_integers(("position_offset",), 0)
        self._settle_ends()
        self._settle_probabilities(DROPOUTS)
        self._settle_positive(POSITIVE, optional=("attention_scale", "initializer_range"))
        self._check_flags()
        self._check_choices(
            activation_function=ACTIVATIONS, norm=("layer_norm", "rms_norm"),
            norm_placement=PLACEMENTS, positions=POSITIONS,
        )  # fmt: skip
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.head_size is None and self.d_model % getattr(self, name):
                raise ValueError(
                    f"{name} must divide d_model where there is no head_size, got "
                    f"{name}={getattr(self, name)} and d_model={self.d_model}"
                )
        self._check_positions()

    def _check_positions(self) -> None:
        if self.positions != "relative" and self.n_positions is None:
            raise ValueError(
                f'n_positions must be an integer for positions="{self.positions}": only '
                '"relative" ones have no limit'
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {self.d_model}")
        if self.frozen_padding and not 0 <= (self.pad_token_id or 0) < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be from 0 to vocab_size - 1 = {self.vocab_size - 1} for "
                f"frozen_padding, got {self.pad_token_id}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> EncoderDecoderConfig:
        """One of the published sizes, with ``changes`` to single fields.

        >>> EncoderDecoderConfig.preset("t5-small", dropout=0.1).positions
        'relative'

        Args:
            name: "transformer-base" or "transformer-big" (2017), "t5-small", "t5-base", "t5-large",
                "t5-v1_1-small", "t5-v1_1-base", "t5-v1_1-large", "bart-base" or "bart-large".
            changes: fields of `EncoderDecoderConfig`.

        Raises:
            ValueError: an unknown name, or changes that make no model.
            TypeError: a change that is no field.
        """
        check_choice("name", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    def resolved(self) -> EncoderDecoderConfig:
        """The same model's config with each default and each name of several said in one way."""
        changes: dict[str, Any] = {"initializer_range": None}  # only new weights know it
        activation = ACTIVATIONS[self.activation_function]
        changes["activation_function"] = "gelu_new" if activation == "gelu_tanh" else activation
        heads = self.encoder_attention_heads, self.decoder_attention_heads
        if heads[0] == heads[1]:
            changes["head_size"] = self.head_dim
            changes["attention_scale"] = self.attention_scale or self.head_dim**-0.5
        if self.positions != "relative":
            changes |= {"relative_buckets": 32, "relative_max_distance": 128}
        if self.positions != "learned":
            changes["position_offset"] = 0
        return dataclasses.replace(self, **changes)

    # The decoder's, for its cache.

    @property
    def n_layer(self) -> int:
        return self.decoder_layers

    @property
    def kv_heads(self) -> int:
        return self.decoder_attention_heads

    @property
    def head_dim(self) -> int:
        return (
            self.d_model // self.decoder_attention_heads
            if self.head_size is None
            else self.head_size
        )
