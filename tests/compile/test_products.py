"""linear_cross_entropy by the model: docs/losses.md has its numbers, and they keep the promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from compile import products

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


def test_the_document_has_the_table() -> None:
    written = PAGE.split(products.MARKERS[0])[1].split(products.MARKERS[1])[0].strip()
    assert written == products.table(), "to write it again: python tests/compile/products.py"


@pytest.mark.parametrize("chip", products.CHIPS)
@pytest.mark.parametrize("rows", [4096, 8192, 32768, 131072])
def test_a_wide_model_is_near_its_products(rows: int, chip: str) -> None:
    """Within 15% of them for 4096 features, on 128 Ki classes."""
    assert products.over_products(products.CHIPS[chip], rows, 4096, 131072) <= 1.15


def test_one_chunk_adds_nothing_up() -> None:
    rows, features, classes = 1000, 512, 3000
    assert products.chunks(rows, features, classes) == 1
    logits, gradients = rows * classes * 6, 10 * rows * features + 4 * classes * features
    assert products.traffic(rows, features, classes) == logits + gradients
