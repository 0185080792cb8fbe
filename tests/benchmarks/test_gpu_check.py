"""The GPU check: what it makes of tests and timings that fail, hang or crash; its rehearsal."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import gpu_check
import pytest
import schema
import supervise

from fastattn.cli import bench


def report_in(folder: Path) -> gpu_check.Report:
    return gpu_check.Report(folder / "gpu_check.json", {"tests": {}, "subjects": {}})


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


def subjects(folder: Path, *names: str, seconds: float = 100, preset: str = "quick") -> dict:
    """What is reported of subjects that are measured on the CPU, for no time."""
    report = report_in(folder)
    end = time.monotonic() + seconds
    gpu_check.check_subjects(report, names, "cpu", preset, folder, end, ["--seconds", "0"])
    return on_disk(report)["subjects"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ffn's preset is its cell with one row; the worker is told so by the axes."""
    measure = gpu_check.measure
    axes = ["--rows", "1", "--hidden", "16", "--direction", "forward", "--layout", "linear"]
    monkeypatch.setattr(gpu_check, "measure", lambda s, given: measure(s, [*given, *axes]))


@pytest.mark.usefixtures("few")
def test_a_subject_has_its_own_file_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = subjects(tmp_path, "ffn")["ffn"]
    assert first == {
        "file": "ffn-quick.json", "exit_code": 0, "rows": 1, "failed": [], "left_out": [],
    }  # fmt: skip
    rows = schema.read(tmp_path / "ffn-quick.json")["rows"]
    monkeypatch.setattr(gpu_check.script.supervise, "run", pytest.fail)  # nothing to measure
    assert subjects(tmp_path, "ffn")["ffn"] == first
    assert schema.read(tmp_path / "ffn-quick.json")["rows"] == rows


def test_subjects_without_time_are_listed_as_skipped(tmp_path: Path) -> None:
    found = subjects(tmp_path, "ffn", "decode", seconds=-1)
    assert found["decode"] == {"file": "decode-quick.json", "skipped": "no time left to begin it"}


def test_a_subject_that_cannot_begin_fails(tmp_path: Path) -> None:
    found = subjects(tmp_path, "ffn", preset="paper")  # which it has on a GPU alone
    assert found["ffn"]["exit_code"] == 2
    said = gpu_check.verdict({"tests": {}, "subjects": found})
    assert said == {"exit_code": 1, "failed": ["ffn: it could not begin"], "skipped": []}


def test_tests_that_passed_are_not_run_again(tmp_path: Path) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text("def test_passes(): pass\n")
    report = report_in(tmp_path)
    for _ in range(2):
        end = time.monotonic() + 60
        gpu_check.check_tests(report, [str(suite)], tmp_path, end, workers=1)
        assert on_disk(report)["tests"][str(suite)]["counts"] == {"passed": 1}
        suite.write_text("def test_passes(): assert False\n")


def test_earlier_results_count_for_the_same_code_and_device_alone(tmp_path: Path) -> None:
    path = tmp_path / "gpu_check.json"
    here = {"device": "x", "commit": "a", "modified": False}
    data = {
        "schema": gpu_check.SCHEMA,
        "environment": here,
        "tests": {"tests/ops": {"exit_code": 0}},
    }
    assert gpu_check.before(path, data) == {}
    schema.write_json(path, data)
    assert gpu_check.before(path, data) == data["tests"]
    for change in ({"device": "y"}, {"commit": "b"}, {"modified": True}):
        assert gpu_check.before(path, {**data, "environment": {**here, **change}}) == {}
    path.write_text("{")
    assert gpu_check.before(path, data) == {}


# --- the whole ----------------------------------------------------------------------------------

TESTED = {"exit_code": 0, "finished": True, "failures": {}}
TIMED = {"exit_code": 0, "rows": 1, "failed": [], "left_out": []}


@pytest.mark.parametrize(
    ("tests", "subject", "code"),
    [
        (TESTED, TIMED, 0),
        ({"exit_code": 1, "finished": True, "failures": {"t": "x"}}, TIMED, 1),
        ({"exit_code": 4, "finished": True, "failures": {}}, TIMED, 1),
        ({"exit_code": None, "finished": False, "failures": {}}, TIMED, 3),
        ({"skipped": "no time"}, TIMED, 3),
        (TESTED, {**TIMED, "failed": ["x"]}, 1),
        (TESTED, {**TIMED, "left_out": ["x"]}, 3),
        (TESTED, {"skipped": "no time"}, 3),
        (TESTED, {"exit_code": 1, "error": "no results file"}, 1),
        ({"skipped": "no time"}, {**TIMED, "failed": ["x"]}, 1),
    ],
)
def test_exit_code(tests: dict, subject: dict, code: int) -> None:
    data = {"tests": {"tests/ops": tests}, "subjects": {"ffn": subject}}
    assert gpu_check.verdict(data)["exit_code"] == code


def test_an_extension_that_does_not_build_fails() -> None:
    built = {"exit_code": 1, "seconds": 1.0, "status": "not built"}
    data = {"extension": built, "tests": {"tests/ops": TESTED}, "subjects": {"ffn": TIMED}}
    assert gpu_check.verdict(data) == {
        "exit_code": 1, "failed": ["the CUDA extension did not build: not built"], "skipped": [],
    }  # fmt: skip
    assert gpu_check.verdict({**data, "extension": {**built, "exit_code": 0}})["exit_code"] == 0


def test_every_subject_fits_the_time() -> None:
    """On a GPU the tests' share and the subjects' limits are less than nine minutes."""
    seconds = gpu_check.TESTS_SHARE * gpu_check.MINUTES * 60 + sum(gpu_check.SUBJECTS.values())
    assert seconds <= gpu_check.MINUTES * 60
    assert gpu_check.MINUTES * 60 + supervise.OVERTIME <= 9 * 60


@pytest.mark.parametrize("name", gpu_check.SUBJECTS)
def test_every_subject_is_a_script_with_presets(name: str) -> None:
    subject = importlib.import_module(name).SUBJECT
    assert subject.name == name
    assert {"quick", "full"} <= {preset for device, preset in subject.presets if device == "cpu"}
    assert set(bench.SUBJECTS) == set(gpu_check.SUBJECTS)


def test_no_gpu_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("few")
def test_rehearsal_without_a_gpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--subjects", "ffn", "--seconds", "0"]
    assert gpu_check.main(arguments) == 0
    data = json.loads((tmp_path / "gpu_check.json").read_text(), parse_constant=pytest.fail)
    assert data["verdict"] == {"exit_code": 0, "failed": [], "skipped": []}
    assert data["environment"]["packages"]["torch"]
    assert data["subjects"]["ffn"]["rows"] == 1
    assert all(room["counts"]["passed"] for room in data["tests"].values())
