"""Sizes are found by the names of this package's configs and of transformers'."""

from __future__ import annotations

from types import SimpleNamespace as Config

import pytest

from fastattn.training.sizes import longest_sequence, text_config


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (Config(n_positions=64), 64),
        (Config(max_position_embeddings=77), 77),
        (Config(n_positions=None, max_position_embeddings=77), 77),
        (Config(n_positions=None), None),
        (Config(), None),
    ],
)
def test_the_longest_sequence(config: Config, longest: int | None) -> None:
    assert longest_sequence(Config(config=config)) == longest
    # A model of text and images: the outer config's positions are of the images.
    outer = Config(get_text_config=lambda: config, max_position_embeddings=5)
    assert text_config(Config(config=outer)) is config
    assert longest_sequence(Config(config=outer)) == longest
