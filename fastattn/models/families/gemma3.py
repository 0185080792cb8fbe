"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786), the text models: RMSNorm of q and k, and rotary
embeddings of their own in the layers with a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.checked import LAYER_TYPES
from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder, gemma2

GLOBAL, LOCAL = 1_000_000.0, 10_000.0  # bases of the rotary frequencies where a file is silent


def read_more(data: Mapping[str, Any]) -> dict[str, Any]:
    """ "rope_parameters" has an entry for each type of layer; before transformers 5 "rope_scaling"
    was of the layers that see all, and "rope_local_base_freq" of the others.
    """
    given = dict(data.get("rope_parameters") or {})
    if unknown := given.keys() - set(LAYER_TYPES):
        raise ValueError(f'"rope_parameters" must be for each type of layer, got {sorted(unknown)}')
    full = {**(given.get("full_attention") or {}), **(data.get("rope_scaling") or {})}
    theta, scaling = decoder.rope_of(full, {"rope_theta": GLOBAL, **data})
    local, local_scaling = decoder.rope_of(
        given.get("sliding_attention") or {},
        {"rope_local_base_freq": LOCAL, **data},
        "rope_local_base_freq",
    )
    if local_scaling is not None:
        raise ValueError(f'"sliding_attention" must not be scaled here, got {local_scaling}')
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_local_theta": local,
        **gemma2.read_scales(data, data["sliding_window_pattern"]),
    }


def write_more(config: GPTConfig) -> dict[str, Any]:
    local = config.rope_theta if config.rope_local_theta is None else config.rope_local_theta
    return {
        **gemma2.write_scales(config),
        "rope_parameters": {
            "full_attention": decoder.rope_parameters(config.rope_theta, config.rope_scaling),
            "sliding_attention": decoder.rope_parameters(local, None),
        },
    }


FAMILY = decoder.family(
    "Gemma 3",
    "gemma3_text",
    "Gemma3",
    {
        **gemma2.DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
    },
    classes={"Gemma3ForCausalLM": "GPT", "Gemma3TextModel": "GPT"},
    fields={k: name for k, name in gemma2.FIELDS.items() if k != "attn_logit_softcapping"},
    constants={**gemma2.CONSTANTS, "qk_norm": "head"},
    fixed={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    read_more=read_more,
    write_more=write_more,
    names={**decoder.PROJECTIONS, **gemma2.NORMS, **decoder.QK_NORMS},
)
