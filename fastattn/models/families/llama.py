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
from fastattn.models.families.family import GGUF, Family

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
    gguf=GGUF(
        keys={
            "vocab_size": "vocab_size",
            "context_length": "max_position_embeddings",
            "embedding_length": "hidden_size",
            "feed_forward_length": "intermediate_size",
            "block_count": "num_hidden_layers",
            "attention.head_count": "num_attention_heads",
            "attention.head_count_kv": "num_key_value_heads",
            "attention.key_length": "head_dim",
            "attention.value_length": "head_dim",
            "attention.layer_norm_rms_epsilon": "rms_norm_eps",
            "rope.dimension_count": "head_dim",
            "rope.freq_base": "rope_theta",
        },
        names={
            "token_embd": "model.embed_tokens",
            "blk.*.attn_norm": "model.layers.*.input_layernorm",
            "blk.*.attn_q": "model.layers.*.self_attn.q_proj",
            "blk.*.attn_k": "model.layers.*.self_attn.k_proj",
            "blk.*.attn_v": "model.layers.*.self_attn.v_proj",
            "blk.*.attn_output": "model.layers.*.self_attn.o_proj",
            "blk.*.ffn_norm": "model.layers.*.post_attention_layernorm",
            "blk.*.ffn_gate": "model.layers.*.mlp.gate_proj",
            "blk.*.ffn_up": "model.layers.*.mlp.up_proj",
            "blk.*.ffn_down": "model.layers.*.mlp.down_proj",
            "output_norm": "model.norm",
            "output": "lm_head",
        },
        heads={
            "model.layers.*.self_attn.q_proj": "n_head",
            "model.layers.*.self_attn.k_proj": "kv_heads",
        },
    ),
)
