"""Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971), and SmolLM2."""

from __future__ import annotations

from fastattn.models.families import decoder
from fastattn.models.families.family import GGUF

FAMILY = decoder.family(
    "Llama",
    "llama",
    "Llama",
    fields={**decoder.FIELDS, **decoder.BIAS, "mlp_bias": "mlp_bias"},
    # A way of adding up in training, with other roundings.
    fixed={"pretraining_tp": 1},
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
