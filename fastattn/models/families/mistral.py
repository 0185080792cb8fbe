"""Mistral (Jiang et al. 2023, arXiv:2310.06825): a Llama with a sliding window in all layers."""

from __future__ import annotations

from fastattn.models.families import decoder

FAMILY = decoder.family(
    "Mistral",
    "mistral",
    "Mistral",
    {
        "max_position_embeddings": 131072,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    fields={**decoder.FIELDS, "sliding_window": "sliding_window"},
    # transformers' Mistral passes layer_types over.
    fixed={"layer_types": None},
)
