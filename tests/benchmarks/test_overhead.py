"""overhead.py: the rows of its three tables and how they are judged, not what a call costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import harness
import overhead
import pytest
import schema
import torch
from checkout import ROOT
from schema import Row

OPS = ("attention", "layer_norm", "rms_norm", "ffn")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton may have been imported to compile, and the tables are of CPU tensors")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", ["quick", "full"])
def test_every_op_has_every_mode_in_every_table(device: str, preset: str) -> None:
    cells = overhead.SUBJECT.cells(device, preset)
    assert len({cell.title for cell in cells}) == len(cells) == 4 * 3 * 3
    assert {cell.on for cell in cells} == {device}


@pytest.mark.parametrize("mode", overhead.MODES)
@pytest.mark.parametrize("table", overhead.TABLES)
@pytest.mark.parametrize("op", OPS)
def test_a_row(op: str, table: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ATTEMPTS", 1)
    monkeypatch.setattr(overhead.Call, "batch_seconds", 1e-4)
    row = overhead.make(device="cpu", op=op, mode=mode, table=table).measure(0.0)
    schema.check(schema.finite(row), Row)
    assert row["right"]
    assert row["direction"] == mode
    assert row["axes"] == {"table": table}
    peers = {"ours"}
    if table == "default":
        peers |= {"ATen"} | ({"ATen without transposes"} if op == "attention" else set())
        assert set(row["peers"]["ATen"]["above_us"]) == {"median", "p20", "p80"}
    assert set(row["peers"]) == peers
    assert ("holds" in row) == ("target" in row)


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("table", ["default", "kernel"])
def test_both_verdicts(table: str, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1e9 if holds else -1e9
    monkeypatch.setattr(overhead, "ABOVE_US", limit)
    monkeypatch.setattr(overhead, "KERNEL_US", {"forward": limit})
    monkeypatch.setattr(harness, "ATTEMPTS", 2)
    cell = overhead.make(device="cpu", op="rms_norm", mode="forward", table=table)
    row = cell.measure(0.0)
    assert row["holds"] is holds
    assert str(limit) in row["target"] or f"{limit:g}" in row["target"]


def test_a_wrong_result_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead.fastattn, "rms_norm", lambda x, w: x + 1.0)
    monkeypatch.setattr(harness, "ATTEMPTS", 1)
    cell = overhead.make(device="cpu", op="rms_norm", mode="forward", table="default")
    assert cell.measure(0.0)["right"] is False


def test_no_kernel_runs_while_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.ops.layer_norm import triton as kernels

    launches = []
    launch = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *inputs: launches.append(1) or launch(*inputs))
    monkeypatch.setattr(harness, "ATTEMPTS", 1)
    overhead.make(device="cpu", op="rms_norm", mode="forward", table="kernel").measure(0.0)
    assert launches == [1]


def test_the_script(tmp_path: Path) -> None:
    """From anywhere, in a process of its own, which sets Triton's interpreter itself."""
    command = [sys.executable, str(ROOT / "benchmarks" / "overhead.py"), "--device", "cpu"]
    path = tmp_path / "overhead.json"
    command += ["--op", "rms_norm", "--mode", "forward", "--seconds", "0.01", "--json", str(path)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
    )
    data = schema.read(path)
    assert data["environment"]["threads"] == 1
    assert [row["axes"]["table"] for row in data["rows"]] == ["default", "kernel", "public"]
    assert all(row["right"] for row in data["rows"]), done.stderr
    held = all(row.get("holds", True) for row in data["rows"])
    assert done.returncode == (0 if held else 1), done.stderr
    assert ("MISSED" in done.stdout) is not held
    assert "ATen" in done.stdout
