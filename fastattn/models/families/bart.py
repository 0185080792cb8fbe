"""BART (Lewis et al. 2020, arXiv:1910.13461)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.families.family import Family, Names

# The fields that have one name here and there.
SAME = (
    "vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads",
    "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "activation_function",
    "dropout", "attention_dropout", "activation_dropout", "bos_token_id", "eos_token_id",
    "pad_token_id", "decoder_start_token_id",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "activation_function": "gelu",
    "dropout": 0.1,
}
# Layers may be left out at random in training; untied, transformers 5 has three embeddings.
FIXED: dict[str, Any] = {
    "is_encoder_decoder": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "tie_word_embeddings": True,
}  # fmt: skip


def read_more(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"embedding_scale": data["d_model"] ** 0.5 if data.get("scale_embedding") else 1.0}


def write_more(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {
        "scale_embedding": config.embedding_scale != 1.0,
        "init_std": config.initializer_range or 0.02,
    }


def _attention(ours: str, theirs: str, cross: bool) -> dict[Names, Names]:
    q, k, v, out = (f"{theirs}.{name}_proj" for name in ("q", "k", "v", "out"))
    if cross:
        return {f"{ours}.q_proj": q, f"{ours}.kv_proj": (k, v), f"{ours}.out_proj": out}
    return {f"{ours}.in_proj": (q, k, v), f"{ours}.out_proj": out}


def _layers(side: str) -> dict[Names, Names]:
    ours, theirs = f"{side}.blocks.*", f"model.{side}.layers.*"
    return {
        **_attention(f"{ours}.attention", f"{theirs}.self_attn", cross=False),
        f"{ours}.norm1": f"{theirs}.self_attn_layer_norm",
        f"{ours}.feed_forward.linear1": f"{theirs}.fc1",
        f"{ours}.feed_forward.linear2": f"{theirs}.fc2",
        f"{ours}.norm2": f"{theirs}.final_layer_norm",
    }


NAMES: dict[Names, Names] = {
    "embedding": "model.shared",
    **_layers("encoder"),
    **_layers("decoder"),
    **_attention(
        "decoder.blocks.*.cross_attention", "model.decoder.layers.*.encoder_attn", cross=True
    ),
    "decoder.blocks.*.cross_norm": "model.decoder.layers.*.encoder_attn_layer_norm",
    "lm_head.logits_bias": "final_logits_bias",
    "lm_head": "lm_head",
}

FAMILY = Family(
    title="BART",
    model_type="bart",
    classes={"BartForConditionalGeneration": "EncoderDecoder", "BartModel": "EncoderDecoder"},
    config_class=EncoderDecoderConfig,
    fields={
        **{name: name for name in SAME},
        "max_position_embeddings": "n_positions",
        "init_std": "initializer_range",
    },
    defaults={
        **DEFAULTS,
        "vocab_size": 50265,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
    constants={
        "positions": "learned",
        "position_offset": 2,
        "embedding_norm": True,
        "logits_bias": True,
        "frozen_padding": True,
    },
    fixed=FIXED,
    read_more=read_more,
    write_more=write_more,
    prefix="model.",
    depths={"encoder.layers.": "encoder_layers", "decoder.layers.": "decoder_layers"},
    aliases={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    },
    zeros=frozenset({"final_logits_bias"}),
    names={
        "encoder.positions": "model.encoder.embed_positions",
        "encoder.embedding_norm": "model.encoder.layernorm_embedding",
        "decoder.positions": "model.decoder.embed_positions",
        "decoder.embedding_norm": "model.decoder.layernorm_embedding",
        **NAMES,
    },
)
