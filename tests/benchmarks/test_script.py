"""The face of the scripts: options, files, exit codes; measured on tiny cells of the ffn."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ffn
import gpu_fast
import pytest
import schema
import script
import torch
from checkout import ROOT
from harness import Cell
from script import Subject

TINY = ["--device", "cpu", "--rows", "1", "--hidden", "16", "--direction", "forward"]
ONE = [*TINY, "--layout", "linear", "--seconds", "0"]


def run(*arguments: str) -> int:
    """The exit code of the ffn's script."""
    try:
        return script.main(ffn.SUBJECT, list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_alone_from_anywhere(tmp_path: Path) -> None:
    """As a user runs it: the script finds its checkout, shows a table, writes the file."""
    file = tmp_path / "ffn.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "ffn.py"), *ONE, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "a peer's time over ours" in done.stdout and "eager" in done.stdout
    assert "[1/1]" in done.stderr
    results = schema.read(file)
    assert (results["subject"], results["device"], results["preset"]) == ("ffn", "cpu", "quick")
    assert results["command"][0] == "benchmarks/ffn.py"
    (row,) = results["rows"]
    assert row["right"] and row["axes"]["inner"] == 64
    assert row["peers"]["ours"]["rounds"] and row["peers"]["eager"]["times_ours"]
    assert results["environment"]["affinity"] and results["environment"]["threads"]


@pytest.mark.parametrize("name", gpu_fast.SUBJECTS)
def test_help_names_every_axis(name: str) -> None:
    subject = importlib.import_module(name).SUBJECT
    text = script.parser_of(subject).format_help()
    assert all(script.option(axis) in text for axis in subject.axes)
    assert "--preset" in text and "--device" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu", "--preset", "huge"], "ffn has no preset 'huge' on cpu; it has quick, full"),
        (["--device", "cuda"], "torch sees no CUDA device; --device cpu measures"),
        (["--device", "cpu", "--resume"], "--resume needs the file to go on with"),
        (["--device", "cpu", "--record", "--json", "x"], "--record names the file itself"),
        (["--device", "cpu", "--layout", "diagonal"], "invalid choice: 'diagonal'"),
        (["--device", "cpu", "--compile", "perhaps"], "'perhaps' is neither yes nor no"),
    ],
)  # fmt: skip
def test_what_cannot_begin(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


def test_list_measures_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.supervise, "run", pytest.fail)
    assert run(*TINY, "--list") == 0
    titles = capsys.readouterr().out.splitlines()
    assert titles == [c.title for c in ffn.SUBJECT.cells("cpu", "quick", {"rows": [1], "hidden": [16], "direction": ["forward"]})]  # fmt: skip


def test_given_axes_replace_the_presets_and_rows_are_there_once() -> None:
    cells: list[Any] = ffn.SUBJECT.cells("cpu", "full", {"rows": [3], "hidden": [8, 16]})
    assert {(c.rows, c.hidden) for c in cells} == {(3, 8), (3, 16)}
    assert len({c.title for c in cells}) == len(cells)


def test_resuming_measures_what_is_missing_alone(tmp_path: Path) -> None:
    file = tmp_path / "ffn.json"
    assert run(*ONE, "--json", str(file)) == 0
    (first,) = schema.read(file)["rows"]
    assert run(*ONE, "--layout", "linear", "conv1d", "--json", str(file), "--resume") == 0
    kept, added = schema.read(file)["rows"]
    assert kept == first and added["axes"]["layout"] == "conv1d"


def test_resuming_wants_the_same_code_and_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ffn.json"
    assert run(*ONE, "--json", str(file), "--commit", "abc") == 0
    assert run(*ONE, "--json", str(file), "--commit", "abd", "--resume") == 2
    assert "commit 'abc', not of ffn, 'abd'" in capsys.readouterr().err
    file.write_text("{")
    assert run(*ONE, "--json", str(file), "--resume") == 2
    assert "ffn.json: Expecting" in capsys.readouterr().err


def test_no_time_is_left_out_and_said(tmp_path: Path) -> None:
    file = tmp_path / "ffn.json"
    assert run(*ONE, "--json", str(file), "--minutes", "0") == 3
    assert [s["why"] for s in schema.read(file)["skipped"]] == ["the time was over"]


def test_record_is_for_committed_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = script.environment("cpu", commit="0123456789abcdef")
    monkeypatch.setattr(script, "environment", lambda *a, **k: {**here, "modified": True})
    assert run(*ONE, "--record") == 2
    assert "--record is for code that is committed" in capsys.readouterr().err
    monkeypatch.setattr(script, "environment", lambda *a, **k: {**here, "device": "AMD EPYC (2)"})
    monkeypatch.setattr(script.checkout, "ROOT", tmp_path)
    path = script.record_path("ffn", "quick", {**here, "device": "AMD EPYC (2)"})
    name = f"{here['date'][:10]}-0123456789-ffn-quick.json"
    assert path == tmp_path / "benchmarks" / "results" / "amd-epyc-2" / name


# --- rows that go wrong ---------------------------------------------------------------------------


class Breaking(Cell):
    """A cell that runs out of memory."""

    title = "big"

    def measure(self, seconds: float, peers: Any = None) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")


def test_a_row_without_memory_says_so_and_the_rest_goes_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    good = ffn.SUBJECT.cells("cpu", "quick", {"rows": [1], "hidden": [8]})[0]
    bad = Breaking(op="ffn", device="cpu", dtype="float32", against={})
    subject = Subject("ffn", "", {}, {}, lambda **_: None)
    arguments = script.parser_of(subject).parse_args(["--device", "cpu", "--seconds", "0"])
    sent: list[dict] = []

    class Lines:
        def send(self, **event: Any) -> None:
            sent.append(event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Lines", Lines)
        patch.setattr(script, "pin", lambda arguments: None)
        assert script.work(subject, [bad, good], arguments) == 0
    rows = [event["row"] for event in sent if "row" in event]
    assert rows[0]["error"] == "OutOfMemoryError: tried to allocate 1 TiB"
    assert not rows[0]["right"] and rows[1]["right"]
    for row in rows:
        schema.check(row, schema.Row)


@pytest.mark.parametrize(
    ("row", "skipped", "code"),
    [
        ({"right": True}, [], 0),
        ({"right": True, "holds": True}, [], 0),
        ({"right": False}, [], 1),
        ({"right": True, "holds": False}, [], 1),
        ({"right": True}, [{}], 3),
        ({"right": False}, [{}], 1),
    ],
)
def test_exit_code(row: Any, skipped: Any, code: int) -> None:
    assert script.exit_code({"rows": [row], "skipped": skipped}) == code  # type: ignore[typeddict-item]


def test_the_worker_speaks_json_and_its_libraries_do_not() -> None:
    """The output of the timed code goes to standard error."""
    command = [sys.executable, str(ROOT / "benchmarks" / "ffn.py"), *ONE, "--worker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(event) for event in events] == [{"cell", "limit"}, {"row"}]
