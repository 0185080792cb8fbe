"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): a Llama with biases in q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder

DEFAULTS = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def read_more(data: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields, and the windows: of the layers from "max_window_layers" on, or as
    "layer_types" says.
    """
    window = data["sliding_window"] if data["use_sliding_window"] else None
    types = data["layer_types"]
    if types is None and window is not None:
        full, layers = data["max_window_layers"], data["num_hidden_layers"]
        types = ["sliding_attention" if n >= full else "full_attention" for n in range(layers)]
    return {**decoder.read_rope(data), "sliding_window": window, "layer_types": types}


def write_more(config: GPTConfig, head_dim: bool = False) -> dict[str, Any]:
    types = list(config.resolved().layer_types or ())
    slides = "sliding_attention" in types
    data = {**decoder.write_more(config, head_dim), "use_sliding_window": slides}
    data["layer_types"] = types
    if slides:
        data |= {
            "sliding_window": config.sliding_window,
            "max_window_layers": types.index("sliding_attention"),
        }
    return data


FAMILY = decoder.family(
    "Qwen 2",
    "qwen2",
    "Qwen2",
    DEFAULTS,
    constants={**decoder.CONSTANTS, "qkv_bias": True},
    read_more=read_more,
    write_more=write_more,
)
