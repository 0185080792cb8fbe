"""Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971), and SmolLM2."""

from __future__ import annotations

from fastattn.models.config import GPTConfig
from fastattn.models.families.decoder import (
    BIAS,
    CONSTANTS,
    DEPTHS,
    FIELDS,
    PRE_NORMS,
    PROJECTIONS,
    read_rope,
    write_more,
)
from fastattn.models.families.family import Family

FAMILY = Family(
    title="Llama",
    model_type="llama",
    classes={"LlamaForCausalLM": "GPT", "LlamaModel": "GPT"},
    config_class=GPTConfig,
    fields={**FIELDS, **BIAS, "mlp_bias": "mlp_bias"},
    defaults={
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
    },
    constants=CONSTANTS,
    # A way of adding up in training, with other roundings.
    fixed={"pretraining_tp": 1},
    read_more=read_rope,
    write_more=write_more,
    prefix="model.",
    depths=DEPTHS,
    names={**PROJECTIONS, **PRE_NORMS},
)
