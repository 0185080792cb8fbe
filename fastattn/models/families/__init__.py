"""The families of models whose Hugging Face folders are read and written, one module each.

A new family is a module with a `Family`, named here. Its config class has `resolved()`: the same
config with each option that may be said in several ways, or by None, said in one.
"""

from __future__ import annotations

from typing import Any

from fastattn.models.families import (
    bart,
    gemma2,
    gemma3,
    gpt2,
    llama,
    marian,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    t5,
)
from fastattn.models.families.family import Family, Transposed

# A model that was made here is written as the first that fits it.
FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        gpt2,
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        phi3,
        olmo2,
        t5,
        bart,
        marian,
    )
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

    Raises ValueError that names, for each family, the options that have no place there.
    """
    reasons = []
    for family in FAMILIES.values():
        if family.fits(config):
            return family
        if isinstance(config, family.config_class):
            try:
                family.write_config(config)
            except (TypeError, ValueError) as error:
                reasons.append(str(error))
    raise ValueError("no family has a place for this config:\n  " + "\n  ".join(reasons))
