"""OLMo 2 (OLMo Team 2025, arXiv:2501.00656): norms after each branch, and of all of q and of k."""

from __future__ import annotations

from fastattn.models.families import decoder

FAMILY = decoder.family(
    "OLMo 2",
    "olmo2",
    "Olmo2",
    {
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    fields={**decoder.FIELDS, **decoder.BIAS},
    constants={**decoder.CONSTANTS, "norm_placement": "output", "qk_norm": "all"},
    names={
        **decoder.PROJECTIONS,
        **decoder.QK_NORMS,
        "blocks.*.norm1": "model.layers.*.post_attention_layernorm",
        "blocks.*.norm2": "model.layers.*.post_feedforward_layernorm",
    },
)
