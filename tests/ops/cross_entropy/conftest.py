"""A few logits count as many for the torch backend, which works on them in blocks of some rows."""

from __future__ import annotations

import pytest

from fastattn.ops.cross_entropy import aten


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "LARGE", 1)
    monkeypatch.setattr(aten, "BLOCK", 40)
