"""ModernBERT (Warner et al. 2024, arXiv:2412.13663)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.families.decoder import rope_of, rope_parameters
from fastattn.models.families.encoder import FIELDS, classes, read_labels, with_heads, write_more
from fastattn.models.families.family import Family

GLOBAL, LOCAL = "full_attention", "sliding_attention"


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    """Labels, the types of the layers and their rotary positions."""
    types = data.get("layer_types")
    if types is None:  # before transformers 5
        every = data["global_attn_every_n_layers"]
        types = [LOCAL if n % every else GLOBAL for n in range(data["num_hidden_layers"])]
    given = data.get("rope_parameters") or {}
    if data.get("rope_scaling"):
        raise ValueError('"rope_scaling" of all layers is not done here: scale "rope_parameters"')
    theta, scaling = rope_of(given.get(GLOBAL) or {}, data, "global_rope_theta")
    local, local_scaling = rope_of(given.get(LOCAL) or {}, data, "local_rope_theta")
    if local_scaling is not None:
        raise ValueError(
            f'"rope_parameters" of "{LOCAL}" must have the "rope_type" "default", '
            f"got {local_scaling['rope_type']!r}"
        )
    return {
        **read_labels(data),
        "layer_types": types,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_local_theta": local,
    }


def _write(config: EncoderConfig) -> dict[str, Any]:
    local = config.rope_local_theta
    return {
        **write_more(config),
        "layer_types": [config.layer_type(layer) for layer in range(config.n_layer)],
        "rope_parameters": {
            GLOBAL: rope_parameters(config.rope_theta, config.rope_scaling),
            LOCAL: rope_parameters(config.rope_theta if local is None else local, None),
        },
        "local_attention": config.local_attention or 128,
    }


LAYER = "model.layers.*"

FAMILY = Family(
    title="ModernBERT",
    model_type="modernbert",
    classes=classes("ModernBert"),
    config_class=EncoderConfig,
    fields={
        **FIELDS,
        "tie_word_embeddings": "tie_word_embeddings",
        "hidden_activation": "activation_function",
        "max_position_embeddings": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "norm_bias": "norm_bias",
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "embedding_dropout": "embd_pdrop",
        "local_attention": "local_attention",
        "decoder_bias": "decoder_bias",
        "classifier_pooling": "pooling",
        "classifier_bias": "transform_bias",
        "classifier_activation": "transform_activation",
    },
    defaults={
        "vocab_size": 50368,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "local_attention": 128,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "pad_token_id": 50283,
        "bos_token_id": 50281,
        "eos_token_id": 50282,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
    },
    constants={
        "n_token_types": 0,
        "positions": "rotary",
        "gated": True,
        "norm_placement": "pre",
        "pooler": False,
    },
    # Dropout where our layers have none; with 0, as all published models have it, none is missing.
    fixed={"attention_dropout": 0.0, "mlp_dropout": 0.0},
    read_more=_read,
    write_more=_write,
    prefix="model.",
    depths={"layers.": "num_hidden_layers"},
    names=with_heads(
        {
            "wte": "model.embeddings.tok_embeddings",
            "norm_e": "model.embeddings.norm",
            "blocks.*.norm1": f"{LAYER}.attn_norm",
            "blocks.*.attention.in_proj": f"{LAYER}.attn.Wqkv",
            "blocks.*.attention.out_proj": f"{LAYER}.attn.Wo",
            "blocks.*.norm2": f"{LAYER}.mlp_norm",
            ("blocks.*.feed_forward.gate", "blocks.*.feed_forward.linear1"): f"{LAYER}.mlp.Wi",
            "blocks.*.feed_forward.linear2": f"{LAYER}.mlp.Wo",
            "norm_f": "model.final_norm",
        },
        {
            "transform.dense": "head.dense",
            "transform.norm": "head.norm",
            "decoder": "decoder",
            "classifier": "classifier",
            "tagger": "classifier",
            "spans": "classifier",
        },
    ),
)
