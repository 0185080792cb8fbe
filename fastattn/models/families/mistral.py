"""Mistral (Jiang et al. 2023, arXiv:2310.06825): a Llama with a sliding window in all layers."""

from __future__ import annotations

from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder
from fastattn.models.families.family import Family

FAMILY = Family(
    title="Mistral",
    model_type="mistral",
    classes={"MistralForCausalLM": "GPT", "MistralModel": "GPT"},
    config_class=GPTConfig,
    fields={**decoder.FIELDS, "sliding_window": "sliding_window"},
    defaults={
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    constants=decoder.CONSTANTS,
    # transformers' Mistral passes layer_types over.
    fixed={"layer_types": None},
    read_more=decoder.read_rope,
    write_more=decoder.write_more,
    prefix="model.",
    depths=decoder.DEPTHS,
    names={**decoder.PROJECTIONS, **decoder.PRE_NORMS},
)
