"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): RMSNorm of each head of q and k, no biases."""

from __future__ import annotations

from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder, qwen2
from fastattn.models.families.family import Family

FAMILY = Family(
    title="Qwen 3",
    model_type="qwen3",
    classes={"Qwen3ForCausalLM": "GPT", "Qwen3Model": "GPT"},
    config_class=GPTConfig,
    fields={**decoder.FIELDS, **decoder.BIAS},
    defaults={**qwen2.DEFAULTS, "head_dim": 128},
    constants={**decoder.CONSTANTS, "qk_norm": "head"},
    read_more=qwen2.read_more,
    write_more=lambda config: qwen2.write_more(config, head_dim=True),
    prefix="model.",
    depths=decoder.DEPTHS,
    names={**decoder.PROJECTIONS, **decoder.PRE_NORMS, **decoder.QK_NORMS},
)
