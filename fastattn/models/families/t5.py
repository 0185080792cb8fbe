"""T5 (Raffel et al. 2020, arXiv:1910.10683), its version 1.1, and Flan-T5."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.families.family import Family, Names

GATED = "gated-"


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    """T5 1.1 neither ties nor scales the head: before transformers 5 one key said both."""
    projection = data["feed_forward_proj"]
    if not isinstance(projection, str):
        raise TypeError(f'"feed_forward_proj" must be a string, got {projection!r}')
    activation = projection.removeprefix(GATED)
    tied = data.get("tie_word_embeddings") is not False
    return {
        "decoder_layers": data.get("num_decoder_layers") or data["num_layers"],
        "gated": projection.startswith(GATED),
        "activation_function": "gelu_new" if projection == "gated-gelu" else activation,
        "logits_scale": data["d_model"] ** -0.5 if data.get("scale_decoder_outputs", tied) else 1.0,
        "tie_word_embeddings": tied,
    }


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    activation = config.resolved().activation_function
    if config.gated:
        activation = GATED + {"gelu_new": "gelu"}.get(activation, activation)
    return {
        "d_kv": config.head_dim,
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.tie_word_embeddings,
        "scale_decoder_outputs": config.logits_scale != 1.0,
    }


def _layers(side: str, feed_forward: int) -> dict[Names, Names]:
    """The layers of a side; the number is that of the feed-forward among the parts of a block."""
    ours, theirs = f"{side}.blocks.*.", f"{side}.block.*.layer."
    attention = f"{theirs}0.SelfAttention."
    return {
        f"{ours}attention.in_proj": tuple(f"{attention}{name}" for name in "qkv"),
        f"{ours}attention.out_proj": f"{attention}o",
        f"{ours}norm1": f"{theirs}0.layer_norm",
        f"{ours}feed_forward.linear2": f"{theirs}{feed_forward}.DenseReluDense.wo",
        f"{ours}norm2": f"{theirs}{feed_forward}.layer_norm",
        f"{side}.relative_bias": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{side}.norm_f": f"{side}.final_layer_norm",
    }


def _feed_forward(config: EncoderDecoderConfig) -> dict[Names, Names]:
    linear1 = "wi_1" if config.gated else "wi"
    names: dict[Names, Names] = {}
    for side, layer in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}.blocks.*.feed_forward", f"{side}.block.*.layer.{layer}"
        names[f"{ours}.linear1"] = f"{theirs}.DenseReluDense.{linear1}"
        names[f"{ours}.gate"] = f"{theirs}.DenseReluDense.wi_0"
    return names


FAMILY = Family(
    title="T5",
    model_type="t5",
    classes={"T5ForConditionalGeneration": "EncoderDecoder", "T5Model": "EncoderDecoder"},
    config_class=EncoderDecoderConfig,
    fields={
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "d_kv": "head_size",
        "d_ff": ("encoder_ffn_dim", "decoder_ffn_dim"),
        "num_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
        "num_heads": ("encoder_attention_heads", "decoder_attention_heads"),
        "relative_attention_num_buckets": "relative_buckets",
        "relative_attention_max_distance": "relative_max_distance",
        "dropout_rate": ("dropout", "attention_dropout", "activation_dropout"),
        "layer_norm_epsilon": "layer_norm_epsilon",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "decoder_start_token_id": "decoder_start_token_id",
    },
    defaults={
        "vocab_size": 32128,
        "d_kv": 64,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "d_model": 512,
        "num_layers": 6,
    },
    constants={
        "n_positions": None,
        "positions": "relative",
        "norm": "rms_norm",
        "norm_placement": "pre",
        "bias": False,
        "attention_scale": 1.0,
    },
    fixed={"is_encoder_decoder": True},
    read_more=_read,
    write_more=_write,
    depths={"encoder.block.": "num_layers", "decoder.block.": "num_decoder_layers"},
    # Of a bias that nothing reads.
    ignored=re.compile(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\..*"
    ),
    aliases={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    own_head=("lm_head.weight", "shared.weight"),
    names={
        "embedding": "shared",
        **_layers("encoder", 1),
        **_layers("decoder", 2),
        "decoder.blocks.*.cross_attention.q_proj": "decoder.block.*.layer.1.EncDecAttention.q",
        "decoder.blocks.*.cross_attention.kv_proj": (
            "decoder.block.*.layer.1.EncDecAttention.k",
            "decoder.block.*.layer.1.EncDecAttention.v",
        ),
        "decoder.blocks.*.cross_attention.out_proj": "decoder.block.*.layer.1.EncDecAttention.o",
        "decoder.blocks.*.cross_norm": "decoder.block.*.layer.1.layer_norm",
        "lm_head": "lm_head",
    },
    more_names=_feed_forward,
)
