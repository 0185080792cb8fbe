"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms around each branch, capped scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder
from fastattn.models.families.family import Names

FIELDS: dict[str, Names] = {
    **{key: name for key, name in decoder.FIELDS.items() if key != "hidden_act"},
    **decoder.BIAS,
    "hidden_activation": "activation_function",
    "sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
DEFAULTS = {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "layer_types": None,
}
CONSTANTS = {**decoder.CONSTANTS, "norm": "offset_rms_norm", "norm_placement": "both"}
NORMS: dict[Names, Names] = {
    "blocks.*.norm1": "model.layers.*.input_layernorm",
    "blocks.*.norm1_out": "model.layers.*.post_attention_layernorm",
    "blocks.*.norm2": "model.layers.*.pre_feedforward_layernorm",
    "blocks.*.norm2_out": "model.layers.*.post_feedforward_layernorm",
}


def read_scales(data: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """The fields that Gemma computes of others; ``pattern``: which layers see all, each so many."""
    types = data["layer_types"]
    if types is None:
        types = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(data["num_hidden_layers"])
        ]
    return {
        "attention_scale": data["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": data["hidden_size"] ** 0.5,
        "layer_types": types,
    }


def write_scales(config: GPTConfig) -> dict[str, Any]:
    return {
        **decoder.write_more(config, head_dim=True),
        "query_pre_attn_scalar": round(config.softmax_scale(0) ** -2),
        "layer_types": list(config.resolved().layer_types or ()),
        "final_logit_softcapping": config.final_logit_softcapping or None,
    }


def write_more(config: GPTConfig) -> dict[str, Any]:
    cap = config.attn_logit_softcapping or None
    return {"attn_logit_softcapping": cap, **write_scales(config)}


FAMILY = decoder.family(
    "Gemma 2",
    "gemma2",
    "Gemma2",
    {**DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    fields=FIELDS,
    constants=CONSTANTS,
    fixed={"use_bidirectional_attention": None},
    read_more=lambda data: {**decoder.read_rope(data), **read_scales(data, pattern=2)},
    write_more=write_more,
    names={**decoder.PROJECTIONS, **NORMS},
)
