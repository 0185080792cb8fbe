"""The parts that Llama and the families after it share: keys, names, rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.checked import LAYER_TYPES
from fastattn.models.config import GPTConfig
from fastattn.models.families.family import Family, Names

# The keys of config.json -> the fields of `GPTConfig`.
FIELDS: dict[str, Names] = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_size",
    "hidden_act": "activation_function",
    "attention_dropout": "attn_pdrop",
    "rms_norm_eps": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
BIAS: dict[str, Names] = {"attention_bias": ("qkv_bias", "out_bias")}

# Llama's values of what a config.json leaves out; the other families name those that differ.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

# The fields that all have.
CONSTANTS: dict[str, Any] = {
    "norm": "rms_norm",
    "positions": "rotary",
    "gated": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}

# The names of the parts.
REST: dict[Names, Names] = {
    "wte": "model.embed_tokens",
    "blocks.*.attention.out_proj": "model.layers.*.self_attn.o_proj",
    "blocks.*.feed_forward.linear2": "model.layers.*.mlp.down_proj",
    "norm_f": "model.norm",
    "lm_head": "lm_head",
}
PROJECTIONS: dict[Names, Names] = {
    "blocks.*.attention.in_proj": (
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "blocks.*.feed_forward.gate": "model.layers.*.mlp.gate_proj",
    "blocks.*.feed_forward.linear1": "model.layers.*.mlp.up_proj",
    **REST,
}
PRE_NORMS: dict[Names, Names] = {
    "blocks.*.norm1": "model.layers.*.input_layernorm",
    "blocks.*.norm2": "model.layers.*.post_attention_layernorm",
}
QK_NORMS: dict[Names, Names] = {
    "blocks.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "blocks.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
}

# In "rope_parameters", but no part of a scaling.
NOT_SCALING = ("rope_theta", "partial_rotary_factor", "type")


def read_rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of a config.json: of transformers 5 ("rope_parameters"), or before.

    Before, "rope_theta" stood beside "rope_scaling", whose "rope_type" was once called "type".
    """
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if any(kind in given for kind in LAYER_TYPES):
        raise ValueError('"rope_parameters" must be those of all layers, got some for each type')
    theta, scaling = rope_of(given, data)
    for place in (given, data):
        if (share := place.get("partial_rotary_factor")) not in (None, 1):
            raise ValueError(f'"partial_rotary_factor" must be 1, got {share!r}')
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_of(
    given: Mapping[str, Any], data: Mapping[str, Any], theta: str = "rope_theta"
) -> tuple[float, dict[str, Any] | None]:
    """The base and the scaling of one "rope_parameters"; ``theta`` is the old key of the base."""
    if not isinstance(given, Mapping):
        raise TypeError(f'"rope_parameters" must be an object, got {given!r}')
    base = given.get("rope_theta") or data.get(theta) or 10000.0
    scaling = {key: value for key, value in given.items() if key not in NOT_SCALING}
    kind = scaling.setdefault("rope_type", given.get("type", "default"))
    if kind == "default":
        return base, None
    first = "original_max_position_embeddings"
    if kind in ("llama3", "yarn", "longrope"):
        scaling[first] = data.get(first) or scaling.get(first) or data["max_position_embeddings"]
    return base, scaling


def write_more(config: GPTConfig, head_dim: bool = False) -> dict[str, Any]:
    """The sizes that our config may leave to be computed, and `read_rope`'s reverse.

    Args:
        head_dim: write it always, where the family computes another one if it is left out.
    """
    return {
        "intermediate_size": config.feedforward_dim,
        "num_key_value_heads": config.kv_heads,
        **({"head_dim": config.head_dim} if head_dim else {}),
        "rope_parameters": rope_parameters(config.rope_theta, config.rope_scaling),
    }


def rope_parameters(theta: float, scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **dict(scaling or {})}


def family(
    title: str, model_type: str, name: str, defaults: Mapping[str, Any] = DEFAULTS, **options: Any
) -> Family:
    """A family whose classes begin with ``name``, Llama's but for its ``options``, which are
    `Family`'s, and the ``defaults`` that differ.
    """
    llamas: dict[str, Any] = {
        "classes": {f"{name}ForCausalLM": "GPT", f"{name}Model": "GPT"},
        "fields": FIELDS,
        "constants": CONSTANTS,
        "read_more": read_rope,
        "write_more": write_more,
        "names": {**PROJECTIONS, **PRE_NORMS},
    }
    return Family(
        title=title,
        model_type=model_type,
        config_class=GPTConfig,
        defaults={**DEFAULTS, **defaults},
        prefix="model.",
        depths={"layers.": "num_hidden_layers"},
        **{**llamas, **options},
    )
