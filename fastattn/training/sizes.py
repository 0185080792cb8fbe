"""Sizes that the config of a model names, one of this package or of transformers."""

from __future__ import annotations

from typing import Any


def text_config(model: Any) -> Any:
    """The part of a model's config that is of text: transformers' may have one for each input."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def longest_sequence(model: Any) -> int | None:
    """How many tokens a sequence of the model may have; None for no limit."""
    config = text_config(model)
    longest: int | None = getattr(config, "n_positions", None)
    return longest or getattr(config, "max_position_embeddings", None)
