"""The split into training and validation."""

from __future__ import annotations

import random

import pytest

from fastattn.training import split_text


@pytest.mark.parametrize("seed", range(20))
def test_split_is_contiguous_at_a_line_and_close_to_the_fraction(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join("x" * draw.randrange(40) + "\n" for _ in range(100))
    fraction = draw.uniform(0.05, 0.95)
    training, validation = split_text(text, fraction)
    assert training + validation == text
    assert training.endswith("\n")
    assert 0 <= len(validation) - fraction * len(text) <= 41  # at most one line more


@pytest.mark.parametrize("text", ["", "\n\n\n", "one line without an end", "one line\n"])
def test_too_little_text_to_split_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"too few to keep 0\.1 of it for validation"):
        split_text(text)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction must be in"):
        split_text("a\nb\n", fraction)
