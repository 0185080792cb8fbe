"""The scripts that judge speed: what they measure, what they write and how they exit.

Speed itself is not judged here: limits are set to what always and what never holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpt
import huggingface
import never_slower
import pytest
import torch
from checkout import ROOT


def read(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("script", ["never_slower", "huggingface"])
def test_help_from_anywhere(script: str, tmp_path: Path) -> None:
    """The script finds the checkout that it belongs to."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


# --- never_slower -------------------------------------------------------------------------------


def test_grid_has_small_odd_and_large_cells_of_every_op() -> None:
    cells = list(never_slower.grid())
    assert len(cells) >= 60
    assert {cell.op for cell in cells} == {"layer_norm", "rms_norm", "ffn", "attention"}
    assert len({(cell.op, cell.shape, cell.dtype, cell.mode) for cell in cells}) == len(cells)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "ffn", "attention"])
def test_both_sides_of_a_cell_do_the_same(op: str) -> None:
    """What is compared for speed has equal results and gradients."""
    for cell in never_slower.grid():
        if cell.op != op or cell.dtype != "float32" or "50257" in cell.shape:
            continue
        ours, eager = (candidate.call() for candidate in never_slower.candidates(cell))
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("factor", "code"), [(1e6, 0), (0.0, 1)])
def test_exit_code_tells_whether_the_rule_holds(
    factor: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(never_slower, "FACTOR", factor)
    monkeypatch.setattr(never_slower, "ALLOWANCE", 0.0)
    monkeypatch.setattr(never_slower, "ATTEMPTS", 2)
    path = tmp_path / "cells.json"
    options = ["--only", "rms_norm", "--stride", "20", "--seconds", "0.01", "--threads", "1"]
    assert never_slower.main([*options, "--json", str(path)]) == code
    data = read(path)
    assert data["summary"]["cells"] == len(data["rows"]) == 2
    assert data["summary"]["failed"] == 2 * code
    assert data["summary"]["geometric_mean"] > 0
    assert all(row["attempts"] == (2 if code else 1) for row in data["rows"])


def test_an_unknown_op_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        never_slower.main(["--only", "softmax"])
    assert stopped.value.code == 2
    assert "rms_norm" in capsys.readouterr().err


# --- overhead -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "factor", "code", "samples"),
    [
        ("attention", "1e6", 0, {"ours", "ATen", "ATen without transposes"}),
        ("rms_norm", "0", 1, {"ours", "ATen"}),
    ],
)
def test_overhead(op: str, factor: str, code: int, samples: set[str], tmp_path: Path) -> None:
    """In a process of its own: the script sets Triton's interpreter for the whole process."""
    path = tmp_path / "overhead.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "overhead.py"), "--only", op]
    command += ["--rounds", "2", "--factor", factor, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == code, done.stderr
    data = read(path)
    modes = ["forward", "forward, grad", "forward+backward"]
    assert [row["mode"] for row in data["default"]] == modes
    assert [row["mode"] for row in data["kernel"]] == modes
    for row in data["default"]:
        assert set(row["samples"]) == samples
    assert ("MISSED" in done.stdout) == bool(code)


# --- huggingface --------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "code"), [(0.0, 0), (1e6, 1)])
def test_huggingface(
    target: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(huggingface, "QUICK_JOB", gpt.TINY_JOB)
    targets = {key: huggingface.Target(target, False) for key in huggingface.TARGETS}
    monkeypatch.setattr(huggingface, "TARGETS", targets)
    path = tmp_path / "gpt2.json"
    options = ["--quick", "--rounds", "2", "--threads", "1", "--json", str(path)]
    assert huggingface.main(options) == code
    data = read(path)
    assert data["same_tokens"] is True
    assert {(row["work"], row["model"]) for row in data["rows"]} == {
        (work, model)
        for work in ("generation", "training step")
        for model in ("transformers", "accelerated", "fastattn.GPT")
    }
    assert all(row["tokens_per_second"] > 0 for row in data["rows"])


def test_disagreeing_models_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed of other tokens is worth nothing."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(huggingface, "QUICK_JOB", gpt.TINY_JOB)
    monkeypatch.setattr(huggingface, "TARGETS", {})
    options = ["--quick", "--work", "generation", "--rounds", "1", "--threads", "1"]
    assert huggingface.main(options) == 0
    build = huggingface.build

    def spoilt(*arguments: object, **named: object) -> dict:
        models = build(*arguments, **named)
        with torch.no_grad():
            for parameter in models[gpt.OURS].parameters():
                parameter.copy_(torch.randn_like(parameter))
        return models

    monkeypatch.setattr(huggingface, "build", spoilt)
    assert huggingface.main(options) == 1
