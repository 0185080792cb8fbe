"""A few logits count as many for the backends, which work on them in blocks and chunks of rows."""

from __future__ import annotations

import pytest

from fastattn.ops.cross_entropy import aten as of_logits
from fastattn.ops.linear_cross_entropy import aten, tiles


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_logits, "LARGE", 1)
    monkeypatch.setattr(of_logits, "BLOCK", 40)
    monkeypatch.setattr(aten, "LARGE", 1)
    monkeypatch.setattr(aten, "MANY", 1)
    monkeypatch.setattr(aten, "CHUNK", 100)
    monkeypatch.setattr(tiles, "CHUNK", 100)  # one tile of rows
