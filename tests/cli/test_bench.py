"""The command `fastattn bench`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastattn.cli import bench, main


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The scripts that were run, with their options; exit codes are taken from their names."""
    commands: list[list[str]] = []

    def call(command: list[str]) -> int:
        commands.append([Path(command[1]).stem, *command[2:]])
        return {"decode": 3, "ffn": 1}.get(commands[-1][0], 0)

    monkeypatch.setattr(subprocess, "call", call)
    return commands


def test_without_a_subject_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in bench.SUBJECTS)


def test_options_go_to_the_script(called: list[list[str]]) -> None:
    assert main(["bench", "attention", "--preset", "full", "--seqlen", "512", "--help"]) == 0
    assert called == [["attention", "--preset", "full", "--seqlen", "512", "--help"]]


def test_all_run_and_the_worst_exit_code_tells(called: list[list[str]]) -> None:
    assert main(["bench", "all", "--preset", "quick"]) == 1
    assert [command[0] for command in called] == list(bench.SUBJECTS)
    assert all(command[1:] == ["--preset", "quick"] for command in called)
    assert main(["bench", "decode"]) == 3


def test_a_wheel_has_no_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    installed = tmp_path / "site-packages" / "fastattn" / "cli" / "bench.py"
    monkeypatch.setattr(bench, "__file__", str(installed))
    refused(["bench", "ffn"], "they come with a checkout")
