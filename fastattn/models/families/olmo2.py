"""OLMo 2 (OLMo Team 2025, arXiv:2501.00656): norms after each branch, and of all of q and of k."""

from __future__ import annotations

from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder
from fastattn.models.families.family import Family

FAMILY = Family(
    title="OLMo 2",
    model_type="olmo2",
    classes={"Olmo2ForCausalLM": "GPT", "Olmo2Model": "GPT"},
    config_class=GPTConfig,
    fields={**decoder.FIELDS, **decoder.BIAS},
    defaults={
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    },
    constants={**decoder.CONSTANTS, "norm_placement": "output", "qk_norm": "all"},
    read_more=decoder.read_rope,
    write_more=decoder.write_more,
    prefix="model.",
    depths=decoder.DEPTHS,
    names={
        **decoder.PROJECTIONS,
        **decoder.QK_NORMS,
        "blocks.*.norm1": "model.layers.*.post_attention_layernorm",
        "blocks.*.norm2": "model.layers.*.post_feedforward_layernorm",
    },
)
