"""The command itself: help, version, errors and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastattn
from fastattn.cli import main

ROOT = Path(__file__).parents[2]


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "demo" in out and "doctor" in out and "--version" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dmeo"], "invalid choice: 'dmeo'"),
        ([], "required: command"),
        (["demo", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_command_line_that_cannot_be_read_exits_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--device", "tpu"], 'device must be "auto", "cpu", "cuda" or "cuda:N", got \'tpu\''),
        (["--device", "cuda:99"], "device 'cuda:99': torch sees"),
    ],
)
def test_a_users_error_is_a_line_and_exits_with_1(
    argv: list[str], message: str, tmp_path: Path, refused: Any
) -> None:
    command = ["demo", "--out", str(tmp_path / "out"), *argv]
    refused(command, message)
    assert not (tmp_path / "out").exists()
    for debug in (["--debug", *command], [*command, "--debug"]):
        with pytest.raises(ValueError, match=r"steps|device"):
            main(debug)


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").touch()
    refused(["demo", "--quick", "--out", str(tmp_path / "file")], "File exists")


def test_a_missing_package_is_named_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = 'the demo needs the package matplotlib: pip install "fastattn[train]"'
    refused(["demo", "--quick", "--out", str(tmp_path / "out")], message)


def test_python_m_runs_it() -> None:
    command = [sys.executable, "-m", "fastattn", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastattn {fastattn.__version__}\n"


def run(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    """The command in a process of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastattn", *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


@pytest.mark.parametrize("command", ["doctor", "bench ffn --list"])
@pytest.mark.parametrize("unbuffered", ["", "1"])  # else all is written at the end
def test_it_ends_quietly_when_nobody_reads_on(command: str, unbuffered: str) -> None:
    process = run(*command.split(), PYTHONUNBUFFERED=unbuffered)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_terminal_that_cannot_show_a_character_shows_its_code() -> None:
    out, error = run("doctor", PYTHONIOENCODING="ascii", FASTATTN_BACKEND="天气").communicate()
    assert error == "" and r"'\u5929\u6c14'" in out
