"""The GPU check: what it makes of tests and timings that fail, hang or crash; its rehearsal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_parts
import pytest
from checkout import ROOT


def report_in(folder: Path) -> gpu_check.Report:
    return gpu_check.Report(folder / "gpu_check.json", {"tests": {}, "parts": {}})


def on_disk(report: gpu_check.Report) -> dict:
    return json.loads(report.path.read_text())


# --- tests --------------------------------------------------------------------------------------


SUITE = """
import time, pytest

def test_passes():
    pass

@pytest.mark.parametrize("x", ["a b", "c"])
def test_fails(x):
    assert x == "c", f"{x} is not c"

@pytest.mark.skip(reason="no")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise RuntimeError("no fixture")

def test_errors(broken):
    pass
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_failing_tests_are_listed_with_their_reasons(tmp_path: Path, workers: int) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    result = gpu_check.run_tests(str(suite), tmp_path, 100, workers)
    assert result["exit_code"] == 1 and result["finished"]
    assert result["counts"] == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    reasons = {test.rpartition("::")[2]: reason for test, reason in result["failures"].items()}
    assert set(reasons) == {"test_fails[a b]", "test_errors"}
    assert "a b is not c" in reasons["test_fails[a b]"]
    assert "no fixture" in reasons["test_errors"]


def test_what_a_stopped_suite_had_done_is_kept(tmp_path: Path) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import time\n"
        "def test_fails(): assert False\n"
        "def test_passes(): pass\n"
        "def test_hangs(): time.sleep(1000)\n"
    )
    start = time.monotonic()
    result = gpu_check.run_tests(str(suite), tmp_path, 8, workers=1)
    assert time.monotonic() - start < 8 + gpu_check.GRACE + 5
    assert not result["finished"]
    assert result["counts"] == {"failed": 1, "passed": 1}
    assert len(result["failures"]) == 1


# --- timings ------------------------------------------------------------------------------------


def following(
    report: gpu_check.Report, program: str, seconds: float = 60
) -> tuple[str, str, str | None]:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        return gpu_check.follow(process, report, "first", time.monotonic() + seconds)
    finally:
        gpu_check.stop(process)


SAY = "import json, os, time\ndef say(**event): print(json.dumps(event), flush=True)\n"


def test_rows_are_on_disk_as_they_come(tmp_path: Path) -> None:
    report = report_in(tmp_path)
    program = SAY + (
        "say(part='ffn', cell='x', limit=50)\n"
        "say(part='ffn', row={'title': 'x', 'error': 'none', 'right': False})\n"
        "say(part='ffn', skipped='y')\n"
    )
    assert following(report, program)[2] is None
    assert on_disk(report)["parts"]["ffn"] == {
        "rows": [{"title": "x", "error": "none", "right": False}],
        "skipped": ["y"],
    }


def test_a_hanging_cell_is_named_and_stopped(tmp_path: Path) -> None:
    program = SAY + "say(part='ffn', cell='x', limit=0.5)\ntime.sleep(1000)\n"
    part, title, why = following(report_in(tmp_path), program)
    assert (part, title) == ("ffn", "x")
    assert why is not None and "stuck" in why


def test_a_cell_that_the_time_cuts_short_is_skipped_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = SAY + "say(part='ffn', cell='x', limit=50)\ntime.sleep(1000)\n"
    stopped = following(report_in(tmp_path), program, seconds=2)
    assert stopped == ("ffn", "x", gpu_check.TIME_IS_OVER)

    report = report_in(tmp_path)
    monkeypatch.setattr(gpu_check, "follow", lambda *_: stopped)
    monkeypatch.setattr(gpu_check, "RESTARTS", 0)
    gpu_check.check_timings(report, ["ffn"], "cpu", tmp_path, time.monotonic() + 100)
    ffn = on_disk(report)["parts"]["ffn"]
    assert not ffn["rows"] and "x: begun" in ffn["skipped"][0]
    assert gpu_check.verdict(report.data)["exit_code"] == 3


def test_a_crashing_cell_is_named(tmp_path: Path) -> None:
    program = SAY + "say(part='ffn', cell='x', limit=50)\nos.abort()\n"
    part, title, why = following(report_in(tmp_path), program)
    assert (part, title) == ("ffn", "x")
    assert why is not None and "SIGABRT" in why


def test_another_process_goes_on_behind_the_guilty_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real child, once stopped at its first cell, then running the rest."""
    report = report_in(tmp_path)
    follow = gpu_check.follow
    stops = [("ceilings", "copy", "crashed"), ("ceilings", "(after copy)", None)]

    def crashing_once(*arguments: object) -> tuple[str, str, str | None]:
        if len(stops) == 2:
            return stops.pop(0)
        return follow(*arguments)

    monkeypatch.setattr(gpu_check, "follow", crashing_once)
    gpu_check.check_timings(report, ["ceilings"], "cpu", tmp_path, time.monotonic() + 100)
    rows = on_disk(report)["parts"]["ceilings"]["rows"]
    assert rows[0] == {"title": "copy", "error": "crashed", "right": False}
    assert [row["op"] for row in rows[1:]] == ["matmul"]


def test_parts_without_time_are_listed_as_skipped(tmp_path: Path) -> None:
    report = report_in(tmp_path)
    gpu_check.check_timings(report, ["ffn", "compiled"], "cpu", tmp_path, time.monotonic() - 1)
    parts = on_disk(report)["parts"]
    assert all(parts[name]["skipped"] and not parts[name]["rows"] for name in ("ffn", "compiled"))
    assert gpu_check.verdict(report.data)["exit_code"] == 3


def test_cells_past_the_time_of_their_part_are_skipped() -> None:
    sent: list[dict] = []

    class Lines:
        def send(self, **event: object) -> None:
            sent.append(event)

    gpu_parts.run("ffn", "cpu", time.monotonic() - 1, 1, Lines())
    titles = [cell.title for cell in gpu_parts.PARTS["ffn"].cells("cpu")]
    assert [event["skipped"] for event in sent] == titles[1:]


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tests", "row", "code"),
    [
        ({"exit_code": 0, "finished": True, "failures": {}}, {"right": True}, 0),
        ({"exit_code": 1, "finished": True, "failures": {"t": "x"}}, {"right": True}, 1),
        ({"exit_code": 4, "finished": True, "failures": {}}, {"right": True}, 1),
        ({"exit_code": None, "finished": False, "failures": {}}, {"right": True}, 3),
        ({"exit_code": 0, "finished": True, "failures": {}}, {"right": False}, 1),
        ({"skipped": "no time"}, {"right": True}, 3),
        ({"skipped": "no time"}, {"right": False}, 1),
    ],
)
def test_exit_code(tests: dict, row: dict, code: int) -> None:
    data = {
        "tests": {"tests/ops": tests},
        "parts": {"ffn": {"rows": [{"title": "x", **row}], "skipped": []}},
    }
    assert gpu_check.verdict(data)["exit_code"] == code


def test_every_part_fits_the_time() -> None:
    """On a GPU the tests' share and the parts' limits, compile aside, leave some of 9 minutes."""
    parts = sum(part.seconds for name, part in gpu_parts.PARTS.items() if name != "compiled")
    assert gpu_check.TESTS_SHARE * gpu_check.MINUTES * 60 + parts < gpu_check.MINUTES * 60


def test_no_gpu_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rehearsal_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu_check.json").read_text(), parse_constant=pytest.fail)
    assert data["verdict"]["exit_code"] == 0
    assert data["environment"]["packages"]["torch"]
    assert list(data["parts"]) == list(gpu_parts.PARTS)
    for name, part in gpu_parts.PARTS.items():
        titles = [cell.title for cell in part.cells("cpu")]
        assert [row["title"] for row in data["parts"][name]["rows"]] == titles
    assert all(room["counts"]["passed"] for room in data["tests"].values())
