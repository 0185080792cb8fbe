"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): RMSNorm of each head of q and k, no biases."""

from __future__ import annotations

from fastattn.models.families import decoder, qwen2

FAMILY = decoder.family(
    "Qwen 3",
    "qwen3",
    "Qwen3",
    {**qwen2.DEFAULTS, "head_dim": 128},
    fields={**decoder.FIELDS, **decoder.BIAS},
    constants={**decoder.CONSTANTS, "qk_norm": "head"},
    read_more=qwen2.read_more,
    write_more=lambda config: qwen2.write_more(config, head_dim=True),
    names={**decoder.PROJECTIONS, **decoder.PRE_NORMS, **decoder.QK_NORMS},
)
