"""`fastattn quantize`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastattn import models
from fastattn.cli import main
from fastattn.nn.int8_weight import Int8Weight
from fastattn.training import Tokenizer
from fastattn.training.evaluation.perplexity import perplexity

TEXT = "the quick brown fox jumps over a lazy dog while it rains. " * 20


@pytest.fixture
def folder(chat_folder: Path, tmp_path: Path) -> Path:
    """Of a model, with a text beside it."""
    (tmp_path / "text.txt").write_text(TEXT)
    return Path(shutil.copytree(chat_folder, tmp_path / "model"))


def test_table_and_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "small"
    text = folder.parent / "text.txt"
    arguments = ["quantize", str(folder), "--text", str(text), "--new-tokens", "4"]
    assert main([*arguments, "--tokens", "150", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    before, after = (models.load(path) for path in (folder, out))
    tokenizer = Tokenizer.load(out)
    read = tokenizer.decode(tokenizer.encode(TEXT)[:150])
    for name, model in (("before", before), ("after", after)):
        expected = perplexity(model, tokenizer, read, context=96, stride=96).perplexity
        assert float(rows[name][2]) == pytest.approx(expected, rel=1e-3)
        assert float(rows[name][1]) > 0
    assert isinstance(after.lm_head.weight, Int8Weight)
    assert "int8: 9 weights quantised" in printed and "left alone: wpe" in printed
    assert float(rows["ratio"][2]) == pytest.approx(
        float(rows["after"][2]) / float(rows["before"][2]), rel=1e-3
    )
    assert main(["generate", str(out), "the quick", "--max-new-tokens", "3"]) == 0


def test_a_folder_of_torchaos(folder: Path) -> None:
    pytest.importorskip("torchao", reason="pip install torchao")
    out, text = folder.parent / "fp8", folder.parent / "text.txt"
    arguments = ["quantize", str(folder), "--text", str(text), "--new-tokens", "2"]
    assert main([*arguments, "--tokens", "40", "--to", "fp8", "--out", str(out)]) == 0
    assert main(["generate", str(out), "the quick", "--max-new-tokens", "3"]) == 0


def test_refused(folder: Path, refused: Any) -> None:
    empty = folder.parent / "empty.txt"
    empty.write_text("")
    for extra, says in (
        (["--tokens", "0"], "--tokens"),
        (["--text", str(empty)], "fewer than 2 tokens"),
        (["--text", str(folder.parent / "missing.txt")], "missing.txt"),
    ):
        refused(["quantize", str(folder), *extra], says)
    refused(["quantize", str(folder.parent / "nowhere")], "nowhere")
