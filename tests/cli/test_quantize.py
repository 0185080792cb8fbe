"""`fastattn quantize`: what it prints and writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import models
from fastattn.cli import main
from fastattn.nn.int8_weight import Int8Weight
from fastattn.training import Tokenizer
from fastattn.training.evaluation.perplexity import perplexity

TEXT = "the quick brown fox jumps over a lazy dog while it rains. " * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.train([TEXT], 280)
    torch.manual_seed(0)
    config = models.GPTConfig(
        vocab_size=280, n_positions=64, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2
    )
    models.GPT(config).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "model"


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
        expected = perplexity(model, tokenizer, read, context=64, stride=64).perplexity
        assert float(rows[name][2]) == pytest.approx(expected, rel=1e-3)
        assert float(rows[name][1]) > 0
    assert isinstance(after.lm_head.weight, Int8Weight)
    assert "int8: 5 weights quantised" in printed and "left alone: wpe" in printed
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
