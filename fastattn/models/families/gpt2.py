"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import re

from fastattn.models.config import GPTConfig
from fastattn.models.families.family import Family, Transposed

FIELDS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function",
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings",
)  # fmt: skip

FAMILY = Family(
    title="GPT-2",
    model_type="gpt2",
    classes={"GPT2LMHeadModel": "GPT", "GPT2Model": "GPT"},
    config_class=GPTConfig,
    fields={name: name for name in FIELDS},
    defaults={"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    fixed={"add_cross_attention": False},
    prefix="transformer.",
    depths={"h.": "n_layer"},
    # Causal masks that older versions of transformers saved as buffers.
    ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
    names={
        "wte": "transformer.wte",
        "wpe": "transformer.wpe",
        "blocks.*.norm1": "transformer.h.*.ln_1",
        "blocks.*.attention.in_proj": Transposed("transformer.h.*.attn.c_attn"),
        "blocks.*.attention.out_proj": Transposed("transformer.h.*.attn.c_proj"),
        "blocks.*.norm2": "transformer.h.*.ln_2",
        "blocks.*.feed_forward.linear1": Transposed("transformer.h.*.mlp.c_fc"),
        "blocks.*.feed_forward.linear2": Transposed("transformer.h.*.mlp.c_proj"),
        "norm_f": "transformer.ln_f",
        "lm_head": "lm_head",
    },
)
