"""Phi 3 and 4 (Abdin et al. 2024, arXiv:2404.14219): packed projections, a part of a head turns.

Those for texts of more than 4,096 tokens scale their rotary embeddings by "longrope".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.config import GPTConfig
from fastattn.models.families import decoder

FIRST = "original_max_position_embeddings"


def read_more(data: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields."""
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind in ("su", "yarn"):  # as files from before transformers 4.43 call it
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise ValueError(
            f'"rope_type" is {kind!r}, and Phi 3 has only "default" and "longrope" '
            "(fastattn.accelerate takes transformers' own model)"
        )
    share = given.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1.0
    theta, scaling = decoder.rope_of({**given, "rope_type": kind}, data)
    return {"rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": share}


def write_more(config: GPTConfig) -> dict[str, Any]:
    data = decoder.write_more(config)
    data["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    if FIRST in data["rope_parameters"]:
        # transformers reads it here, not beside the factors
        data[FIRST] = data["rope_parameters"][FIRST]
    return data


FAMILY = decoder.family(
    "Phi 3",
    "phi3",
    "Phi3",
    {
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        FIRST: 4096,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    fields={
        **decoder.FIELDS,
        "resid_pdrop": "resid_pdrop",
        "sliding_window": "sliding_window",
    },
    read_more=read_more,
    write_more=write_more,
    names={
        **decoder.REST,
        **decoder.PRE_NORMS,
        "blocks.*.attention.in_proj": "model.layers.*.self_attn.qkv_proj",
        ("blocks.*.feed_forward.gate", "blocks.*.feed_forward.linear1"): (
            "model.layers.*.mlp.gate_up_proj"
        ),
    },
)
