"""A missing optional package is said with the extra that brings it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastattn.training import History, TensorBoard, Tokenizer
from fastattn.training.data import read_records
from fastattn.training.optional import require


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r'a test needs the package surely_not_there: pip install "fastattn\[train\]"'
    for name in ("surely_not_there", "surely_not_there.part"):
        with pytest.raises(ImportError, match=message):
            require(name, "train", "a test")


def test_another_missing_import_is_not_disguised() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'json\.nothing'"):
        require("json.nothing", "train", "a test")


def test_features_say_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for package in ("tokenizers", "matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'the tokenizer needs .*"fastattn\[train\]"'):
        Tokenizer.train(["text"])
    with pytest.raises(ImportError, match=r'the loss curve needs .*"fastattn\[train\]"'):
        History().plot(f"{tmp_path}/loss.png")
    with pytest.raises(ImportError, match=r'TensorBoard needs .*"fastattn\[tensorboard\]"'):
        TensorBoard("anywhere")
    for package in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [])
    table = Path(f"{tmp_path}/a.parquet")
    table.touch()
    with pytest.raises(ImportError, match=r'needs .* pyarrow: .*"fastattn\[parquet\]"'):
        list(read_records(table))
