"""The GPU check, rehearsed on a CPU: its order, its shares, how it goes on, its exit codes."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import gpu_fast
import gpu_report
import gpu_right
import ledger
import pytest
import schema
from gpu_report import Exit, Verdict

from fastattn.cli import bench

# --- a checkout with a fake GPU -------------------------------------------------------------------


class Fake:
    """A checkout of three suites that write down what runs, beside a GPU that is not there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = folder / "checkout", folder / "out"
        self.happened = folder / "happened"
        self.set = monkeypatch.setattr
        self.write(
            "pyproject.toml", '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"'
        )
        for room in ("conformance", "sweep", "ops", "nn"):
            self.test(room, "first", "pass")
            self.test(room, "second", "pass")
        self.set(gpu_report, "ROOT", self.folder)
        self.set(gpu_right, "ROOT", self.folder)
        self.set(gpu_right, "CONFORMANCE", ("tests/conformance",))
        self.set(gpu_right, "SWEEP", ("tests/sweep",))
        self.set(gpu_right, "workers", lambda: 1)
        self.set(gpu_right, "GRACE", 1.0)
        self.set(gpu_right, "LEAST", 0.0)
        # Each of its many pytests starts in half the time.
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.setenv("PYTEST_ADDOPTS", "-p xdist.plugin")

    def gpu(self) -> Fake:
        """Let there be one."""

        def where(device: str, commit: str | None) -> dict[str, Any]:
            return {"device": "a GPU", "packages": {"torch": "2"}}

        self.set("torch.cuda.is_available", lambda: True)
        self.set("torch.cuda.current_device", lambda: 0)
        self.set(gpu_report, "environment", where)
        self.set(gpu_right, "architecture", lambda: "90a")
        self.set(gpu_right.extension, "status", lambda: "built")
        self.set(gpu_right.extension, "unavailable", lambda device: None)
        self.assemblers({"path": "/newer/ptxas", "version": [13, 3]})
        self.builds("pass")
        return self

    def assemblers(self, second: Any) -> None:
        self.set(gpu_right, "assemblers", lambda: {"second": second})

    def builds(self, statement: str) -> None:
        """Let the build do this instead of compiling."""
        code = (
            f"import os\n{self.note('build ' + '{os.environ[`FASTATTN_CUDA_ARCHS`]}')}\n{statement}"
        )
        self.set(gpu_right, "BUILD", (sys.executable, "-c", code))

    def note(self, text: str) -> str:
        text = text.replace("`", '"')
        return f"open({str(self.happened)!r}, 'a').write(f'{text}\\n')"

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def test(self, room: str, name: str, *statements: str) -> None:
        """A file with a test `triton` for each statement."""
        tests = [
            f"def test_triton_{n}():\n    {self.note(f'{room} {name} {n}')}\n    {statement}\n"
            for n, statement in enumerate(statements)
        ]
        self.write(f"tests/{room}/test_{name}.py", "import os, time\n" + "".join(tests))

    def run(self, *arguments: str) -> int:
        self.happened.unlink(missing_ok=True)
        rooms = ["--part", "right", "--rooms", "tests/ops", "tests/nn"]
        return gpu_check.main(["--out", str(self.out), *rooms, *arguments])

    def suite(
        self, workers: int = 1, seconds: float = 100, patience: float = 100
    ) -> dict[str, Any]:
        """Run only the suite."""
        self.happened.unlink(missing_ok=True)
        self.out.mkdir(exist_ok=True)
        step = gpu_right.Step("suite", ["tests/ops", "tests/nn"])
        return gpu_right.run_tests(step, self.out, seconds, workers, patience, {})

    @property
    def events(self) -> list[str]:
        """The tests and builds that ran, without the numbers of the tests."""
        lines = self.happened.read_text().splitlines() if self.happened.exists() else []
        return [line.removesuffix(" 0") for line in lines]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads((self.out / "gpu_right.json").read_text(), parse_constant=pytest.fail)

    @property
    def verdict(self) -> dict[str, Any]:
        return self.data["verdict"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch).gpu()


SWEEP = ["sweep first", "sweep second"]
SUITE = ["ops first", "nn first", "ops second", "nn second"]


def test_order(fake: Fake) -> None:
    """Build, conformance, sweep, again with another ptxas, and a file of each room in turn."""
    assert fake.run() == Exit.RIGHT
    first = ["build 90a", "conformance first", "conformance second"]
    assert fake.events == [*first, *SWEEP, *SWEEP, *SUITE]
    assert fake.verdict == {"exit_code": 0, "wrong": [], "missed": [], "left_out": []}
    assert list(fake.data["tests"]) == ["conformance", "sweep", "second ptxas", "suite"]
    assert fake.data["tests"]["suite"]["rooms"] == {
        "tests/ops": {"passed": 2}, "tests/nn": {"passed": 2},
    }  # fmt: skip


def test_what_the_steps_are_told(fake: Fake) -> None:
    """The second sweep has its ptxas and a cache of its own; both know where the digests are."""
    names = ("FASTATTN_SWEEP_WRITE", "FASTATTN_SWEEP_COMPARE", "TRITON_CACHE_DIR")
    names += ("TRITON_PTXAS_PATH", "FASTATTN_CUDA_ARCHS", "OMP_NUM_THREADS")
    said = fake.folder.parent / "said"
    fake.test("sweep", "first", f"""
    with open({str(said)!r}, "a") as file:
        print([os.environ.get(name) for name in {names}], file=file)""")  # fmt: skip
    fake.set(gpu_right.os, "sched_getaffinity", lambda pid: range(6))
    assert fake.run() == Exit.RIGHT
    first, second = map(eval, said.read_text().splitlines())
    digests = str(fake.out / "right-digests")
    assert first == [digests, None, first[2], first[3], "90a", "6"]
    assert second == [None, digests, second[2], "/newer/ptxas", "90a", "6"]
    assert second[2] not in (None, first[2]) and not Path(second[2]).exists()


def test_a_step_that_was_cut_short(fake: Fake) -> None:
    """Each room had its share, what was done is kept, and what ran at the end is named."""
    fake.test("ops", "second", "os.path.exists('fixed') or time.sleep(1000)")
    fake.test("nn", "first", "pass", "assert os.path.exists('fixed'), 'so wrong'")
    start = time.monotonic()
    result = fake.suite(seconds=12)
    assert time.monotonic() - start < 12 + 5
    assert result["exit_code"] is None
    assert result["rooms"] == {"tests/ops": {"passed": 1}, "tests/nn": {"passed": 1, "failed": 1}}
    said = gpu_right.verdict({"tests": {"suite": result}})
    (wrong,), (left_out,) = said.wrong, said.left_out
    assert (
        wrong.startswith("suite: tests/nn/test_first.py::test_triton_1: ") and "so wrong" in wrong
    )
    assert left_out.endswith("then ran tests/ops/test_second.py::test_triton_0")
    fake.write("fixed", "")
    assert gpu_right.verdict({"tests": {"suite": fake.suite()}}) == Verdict()
    assert fake.events == ["ops second", "nn first 1", "nn second"]


def test_it_goes_on_where_it_stopped(fake: Fake) -> None:
    """A test that has passed does not run again, unless the code has changed."""
    fake.assemblers(None)
    fake.test("conformance", "second", "assert os.path.exists('fixed')")
    assert fake.run() == Exit.WRONG
    fake.write("fixed", "")
    assert fake.run() == Exit.RIGHT
    assert fake.events == ["build 90a", "conformance second"]
    assert fake.data["tests"]["suite"]["passed_before"] == 4
    assert fake.data["tests"]["suite"]["counts"] == {"passed": 4}
    fake.write("fastattn/kernel.py", "pass")
    assert fake.run() == Exit.RIGHT
    assert fake.events[-6:] == [*SWEEP, *SUITE]


@pytest.mark.parametrize("change", ["nothing", "code", "device", "packages", "broken file"])
def test_the_same_code_device_and_packages(fake: Fake, change: str) -> None:
    """are what an earlier run is remembered for."""
    fake.out.mkdir()
    there = report_in(fake.out)
    if change == "code":
        fake.write("csrc/kernel.cuh", "// changed")
    elif change == "broken file":
        there.path.write_text("{")
    else:
        where = gpu_report.environment("cuda", None) | {change: {"torch": "3"}}
        fake.set(gpu_report, "environment", lambda device, commit: where)
    assert report_in(fake.out).goes_on == (change == "nothing")


def test_an_extension_that_does_not_build_is_wrong_and_the_rest_runs(fake: Fake) -> None:
    fake.builds("raise SystemExit(3)")
    assert fake.run() == Exit.WRONG
    assert fake.verdict["wrong"] == ["build: the CUDA extension is not there: exit code 3"]
    assert fake.events[-4:] == SUITE


def test_steps_without_time_are_left_out(fake: Fake) -> None:
    fake.set(gpu_right, "LEAST", 100.0)
    assert fake.run("--minutes", "1") == Exit.LEFT_OUT
    assert fake.verdict["left_out"][0] == "conformance: no time left to begin it"
    assert len(fake.verdict["left_out"]) == 4 and fake.events == ["build 90a"]


def wrong(result: dict[str, Any]) -> list[str]:
    return gpu_right.verdict({"tests": {"suite": result}}).wrong


def test_a_file_that_cannot_be_imported_is_wrong(fake: Fake) -> None:
    fake.write("tests/nn/test_first.py", "import no_such_module")
    (said,) = wrong(fake.suite())
    assert said.startswith("suite: tests/nn/test_first.py: ") and "no_such_module" in said


CRASHES = {"crash": "os._exit(3)", "hang": "time.sleep(1000)"}


@pytest.mark.parametrize("how", CRASHES)
def test_a_process_that_crashes_or_hangs_costs_one_test(fake: Fake, how: str) -> None:
    fake.test("ops", "first", CRASHES[how], "pass", "pass")
    result = fake.suite(workers=2, patience=2)
    (said,) = wrong(result)
    assert said.startswith("suite: tests/ops/test_first.py::test_triton_0: ") and "crashed" in said
    assert result["counts"] == {"passed": 5, "error": 1}


# --- the ledger -----------------------------------------------------------------------------------

OUTCOMES = """
import pytest

@pytest.mark.parametrize("x", ["a b", "c"])
def test_fails(x):
    assert x == "c", f"{x} is not c"

@pytest.mark.skip(reason="no")
def test_skipped():
    pass

@pytest.mark.xfail
def test_expected_to_fail():
    assert 0

@pytest.fixture
def broken():
    raise RuntimeError("no fixture")

def test_error(broken):
    pass

@pytest.fixture
def breaks():
    yield
    raise RuntimeError("no end")

def test_error_at_the_end(breaks):
    pass
"""


def test_outcomes_and_reasons(fake: Fake) -> None:
    fake.write("tests/nn/test_first.py", OUTCOMES)
    result = fake.suite(workers=2)
    assert result["exit_code"] == 1 and not result["running"]
    assert result["counts"] == {"passed": 4, "failed": 1, "skipped": 2, "error": 2}
    reasons = {test.rpartition("::")[2]: why for test, why in result["failures"].items()}
    said = {
        "test_fails[a b]": "a b is not c",
        "test_error": "no fixture",
        "test_error_at_the_end": "no end",
    }
    assert reasons.keys() == said.keys()
    assert all(said[test] in why for test, why in reasons.items())


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    lines = ['{"starts": "pytest"}', '{"begins": "a"}', '{"begins": "b"}',
             '{"test": "a", "outcome": "passed", "reason": ""}']  # fmt: skip
    path.write_text("\n".join([*lines, '{"test": "b", "outc']))
    found = ledger.tally(path)
    assert found.passed == ["a"] and found.running == ["b"]
    path.write_text("\n".join([*lines, lines[0]]))
    assert ledger.tally(path).running == []
    assert ledger.tally(tmp_path / "none") == ledger.Tally()


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "fast"), [(0, 0), (3, 0), (3, 4), (1, 4), (0, 1)])
def test_exit_code_of_both_parts(
    right: int, fast: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong before missed before left out; the second part runs whatever the first one says."""
    parts = []
    results = {"right": Exit(right), "fast": Exit(fast)}
    monkeypatch.setattr(gpu_check, "check", lambda part, a: parts.append(part) or results[part])
    code = gpu_check.main(["--device", "cpu", "--out", str(tmp_path)])
    assert parts == ["right", "fast"]
    assert code == next(code for code in (1, 4, 3, 0) if code in (right, fast))
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--part", "fast"]) == fast


def test_no_gpu_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--out", str(tmp_path / "out")])
    assert stopped.value.code == Exit.COULD_NOT_BEGIN
    assert "--device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- timings --------------------------------------------------------------------------------------


def report_in(folder: Path, seconds: float = 100) -> gpu_report.Report:
    return gpu_report.Report(folder, "fast", "cpu", seconds / 60, None, time.monotonic())


def subjects(folder: Path, *names: str, seconds: float = 100, preset: str = "quick") -> dict:
    """The report on subjects that are measured on the CPU, for no time."""
    report = report_in(folder, seconds)
    gpu_fast.check(report, "cpu", names, preset, ["--seconds", "0"])
    return json.loads(report.path.read_text())["subjects"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ffn's preset is its cell with one row; the worker is told so by the axes."""
    measure = gpu_fast.measure
    axes = ["--rows", "1", "--hidden", "16", "--direction", "forward", "--layout", "linear"]
    monkeypatch.setattr(gpu_fast, "measure", lambda s, given: measure(s, [*given, *axes]))


@pytest.mark.usefixtures("few")
def test_a_subject_has_its_own_file_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = subjects(tmp_path, "ffn")["ffn"]
    assert first == {
        "file": "ffn-quick.json", "exit_code": 0, "rows": 1, "wrong": [], "missed": [],
        "left_out": [],
    }  # fmt: skip
    rows = schema.read(tmp_path / "ffn-quick.json")["rows"]
    monkeypatch.setattr(gpu_fast.script.supervise, "run", pytest.fail)  # nothing to measure
    assert subjects(tmp_path, "ffn")["ffn"] == first
    assert schema.read(tmp_path / "ffn-quick.json")["rows"] == rows


def test_a_subject_that_cannot_begin_is_wrong(tmp_path: Path) -> None:
    found = subjects(tmp_path, "ffn", preset="paper")  # which it has only on a GPU
    assert found["ffn"]["exit_code"] == 2
    assert gpu_fast.verdict({"subjects": found}) == Verdict(wrong=["ffn: it could not begin"])


def test_shares_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick subject has its seconds and what was left before it; other presets have all."""
    given: list[float] = []
    monkeypatch.setattr(
        gpu_fast, "measure", lambda subject, options: given.append(60 * float(options[-1])) or 0
    )
    names = list(gpu_fast.SUBJECTS)[:3]
    gpu_fast.check(report_in(tmp_path, 600), "cpu", names, "quick", [])
    ends = itertools.accumulate(gpu_fast.SUBJECTS[name] for name in names)
    assert given == pytest.approx(list(ends), abs=5)  # the fake ones take no time
    given.clear()
    gpu_fast.check(report_in(tmp_path, 600), "cpu", names, "full", [])
    assert given == pytest.approx([600] * 3, abs=5)


ROW = {"title": "a", "right": True}


@pytest.mark.parametrize(
    ("row", "skipped", "expected"),
    [
        (ROW, [], Verdict()),
        ({**ROW, "holds": True}, [], Verdict()),
        ({**ROW, "holds": False}, [], Verdict(missed=["ffn: a"])),
        ({**ROW, "right": False, "holds": False}, [], Verdict(wrong=["ffn: a"])),
        (ROW, [{"title": "b", "why": "time"}], Verdict(left_out=["ffn: b"])),
    ],
)
def test_targets_missed_are_told_from_wrong_results(
    row: dict, skipped: list, expected: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_fast, "read", lambda file: {"rows": [row], "skipped": skipped})
    entry = {"exit_code": 1, **gpu_fast.outcome(Path("file"))}
    assert gpu_fast.verdict({"subjects": {"ffn": entry}}) == expected


@pytest.mark.parametrize("name", gpu_fast.SUBJECTS)
def test_every_subject_is_a_script_with_presets(name: str) -> None:
    subject = importlib.import_module(name).SUBJECT
    assert subject.name == name
    assert {"quick", "full"} <= {preset for device, preset in subject.presets if device == "cpu"}
    assert set(bench.SUBJECTS) == set(gpu_fast.SUBJECTS)


@pytest.mark.usefixtures("few")
def test_rehearsal_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parts on the CPU that is there: no build and no second ptxas."""
    fake = Fake(tmp_path, monkeypatch)
    more = ["--device", "cpu", "--part", "right", "fast", "--subjects", "ffn", "--seconds", "0"]
    assert fake.run(*more) == Exit.RIGHT
    assert fake.events == ["conformance first", "conformance second", *SWEEP, *SUITE]
    fast = json.loads((fake.out / "gpu_fast.json").read_text(), parse_constant=pytest.fail)
    assert fast["verdict"] == fake.verdict == {
        "exit_code": 0, "wrong": [], "missed": [], "left_out": [],
    }  # fmt: skip
    assert fast["subjects"]["ffn"]["rows"] == 1
    assert fast["environment"]["packages"]["torch"]
