"""What two runs of the sweep are compared by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_other_bits_are_found(
    keep: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"out": torch.randn(3, 4).T, "dq": torch.tensor([torch.nan, 1.0]), "dbias": None}
    monkeypatch.setenv("FASTATTN_SWEEP_WRITE", str(tmp_path))
    keep(results)
    monkeypatch.delenv("FASTATTN_SWEEP_WRITE")
    monkeypatch.setenv("FASTATTN_SWEEP_COMPARE", str(tmp_path))
    keep({**results, "out": results["out"].clone(memory_format=torch.contiguous_format)})
    with pytest.raises(AssertionError, match=r"other bits than in the first run: dq\n"):
        keep({**results, "dq": results["dq"].nextafter(torch.tensor(2.0))})
    with pytest.raises(AssertionError, match="dbias"):
        keep({**results, "dbias": torch.zeros(1)})
    monkeypatch.setenv("FASTATTN_SWEEP_COMPARE", str(tmp_path / "none"))
    with pytest.raises(pytest.skip.Exception, match="no results of this case"):
        keep(results)
