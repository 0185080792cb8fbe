"""The families of models whose Hugging Face folders are read and written, one module each.

A new family is a module with a `Family`, named here. Its config class has `resolved()`: the same
config with each option that may be said in several ways, or by None, said in one.
"""

from __future__ import annotations

from typing import Any

from fastattn.models.families import (
    bart,
    bert,
    gemma2,
    gemma3,
    gpt2,
    llama,
    marian,
    mistral,
    modernbert,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    roberta,
    t5,
)
from fastattn.models.families.family import Family, Transposed

DECODERS = (gpt2, llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, olmo2)
ENCODERS = (bert, roberta, modernbert)

SEQUENCE_TO_SEQUENCE = (t5, bart, marian)

# A model that was made here is written as the first that fits it.
FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (*DECODERS, *ENCODERS, *SEQUENCE_TO_SEQUENCE)
}

__all__ = ["FAMILIES", "Family", "Transposed", "family_of", "family_that_fits"]


def family_of(model_type: Any) -> Family:
    """The family of a config.json's "model_type"; ValueError that names the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f'"model_type" must be one of {", ".join(map(repr, FAMILIES))}, got {model_type!r}. '
            "Other models can be read by transformers and sped up by fastattn.accelerate"
        )
    return FAMILIES[model_type]


def family_that_fits(config: Any) -> Family:
    """The first family whose config.json can say all that ``config`` does.

    Raises ValueError that names the options for which the nearest one has no place.
    """
    losses = {}
    for family in FAMILIES.values():
        if isinstance(config, family.config_class):
            try:
                losses[family] = family.lost(config)
            except ValueError:  # the family refuses what was written
                continue
            if not losses[family]:
                return family
    nearest = min(losses, key=lambda family: len(losses[family]), default=None)
    if nearest is None:
        raise ValueError(f"no family has a place for {config}")
    raise ValueError(
        f"no family of transformers has a place for this config: the nearest, {nearest.title}, has "
        f"none for {', '.join(losses[nearest])}. Save model.state_dict() instead"
    )
