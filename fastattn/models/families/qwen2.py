"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): a Llama with biases in q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder
from fastattn.models.families.family import Family

DEFAULTS = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
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


FAMILY = Family(
    title="Qwen 2",
    model_type="qwen2",
    classes={"Qwen2ForCausalLM": "GPT", "Qwen2Model": "GPT"},
    config_class=GPTConfig,
    fields=decoder.FIELDS,
    defaults=DEFAULTS,
    constants={**decoder.CONSTANTS, "qkv_bias": True},
    read_more=read_more,
    write_more=write_more,
    prefix="model.",
    depths=decoder.DEPTHS,
    names={**decoder.PROJECTIONS, **decoder.PRE_NORMS},
)
