"""The first part of the GPU check: do the kernels compute the right results on this GPU?

1. `build`: the CUDA extension, for this GPU only;
2. `conformance`: the programs that hold the emulator of its kernels to the GPU;
3. `sweep`: every kernel of every backend at every row of the tile tables, and one call of each
   feature (tests/sweep);
4. `second ptxas`: the Triton kernels of the sweep again, assembled by another ptxas, if there is
   one. Each case must have the bits that it had;
5. `suite`: as many of the other tests as there is time for, a file of each room in turn.

Pytest's processes steal work from each other: each begins with a run of neighbouring tests, which
share compiled kernels and fixtures, as `--dist loadfile` has it, but no process waits while another
one has a long file before it. A test that has passed is not run again by the next run of the same
code on the same device.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ledger
import torch
from checkout import ROOT
from gpu_report import Report, Verdict
from supervise import child_environment, stop

from fastattn import extension
from fastattn.ops.common import ptxas

MINUTES = 3.7  # with the start of Python and the last test less than four
BUILD_SECONDS = 120.0
GRACE = 10.0  # seconds that an interrupted pytest has to end by itself
LEAST = 20.0  # seconds in which a step can do something: it takes some to import torch
# Seconds after which a test must be stuck; on a CPU the first one may compile the emulator.
PATIENCE = {"cuda": 100.0, "cpu": 1000.0}
MOST_WORKERS = 16

CONFORMANCE = ("tests/conformance",)
SWEEP = ("tests/sweep",)
ROOMS = (
    "tests/ops", "tests/nn", "tests/models", "tests/integrations", "tests/flash_attn",
    "tests/training", "tests/test_features.py",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Tests that are run together."""

    name: str
    paths: Sequence[str]
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def check(report: Report, device: str, rooms: Sequence[str] = ROOMS) -> Verdict:
    """Take the steps in order, each with all the time that is left."""
    data = report.data
    if not report.goes_on:
        forget(report.out)
    environment = {}
    if device == "cuda":
        print("== build", flush=True)
        environment["FASTATTN_CUDA_ARCHS"] = architecture()
        data["build"] = build(report.out, min(BUILD_SECONDS, report.left()))
        print(f"   {data['build']['status']}, {data['build']['seconds']} s", flush=True)
        report.save()
    data["tests"] = {}
    with ExitStack() as stack:
        for step in steps(report, device, rooms, stack):
            print(f"== {step.name}", flush=True)
            if report.left() < LEAST:
                result: dict[str, Any] = {"skipped": "no time left to begin it"}
            else:
                result = run_tests(
                    step, report.out, report.left(), workers(), PATIENCE[device], environment
                )
                print(f"   {result['counts']} in {result['seconds']} s", flush=True)
            data["tests"][step.name] = result
            report.save()
    return verdict(data)


def steps(report: Report, device: str, rooms: Sequence[str], stack: ExitStack) -> Iterator[Step]:
    yield Step("conformance", CONFORMANCE)
    digests = (report.out / "right-digests").resolve()
    yield Step("sweep", SWEEP, environment={"FASTATTN_SWEEP_WRITE": str(digests)})
    if device == "cuda":
        report.data["ptxas"] = assemblers()
        if (other := report.data["ptxas"]["second"]) is not None:
            cache = stack.enter_context(tempfile.TemporaryDirectory())  # as large as all kernels
            yield Step(
                "second ptxas", SWEEP, ("-k", "triton"),
                {"FASTATTN_SWEEP_COMPARE": str(digests), "TRITON_CACHE_DIR": cache}
                | dict.fromkeys(ptxas.VARIABLES, other["path"]),
            )  # fmt: skip
    yield Step("suite", rooms)


def forget(out: Path) -> None:
    """Remove the files of a run of other code, or on another device."""
    for old in out.glob("right-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def architecture() -> str:
    """This GPU, as FASTATTN_CUDA_ARCHS has it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def workers() -> int:
    """Processes of pytest; one without pytest-xdist."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def assemblers() -> dict[str, Any]:
    """The ptxas in use, another one, and a known fault of the first."""
    major, minor = torch.cuda.get_device_capability()
    try:
        used, others = ptxas.in_use(10 * major + minor), ptxas.others(10 * major + minor)
    except (ImportError, RuntimeError) as error:  # the sweep fails for it
        return {"in_use": None, "second": None, "warning": str(error)}
    return {
        "in_use": used._asdict(),
        "second": others[0]._asdict() if others else None,
        "warning": ptxas.warning(10 * major + minor),
    }


# --- the extension --------------------------------------------------------------------------------

BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")


def build(out: Path, seconds: float) -> dict[str, Any]:
    """Build the extension into the checkout."""
    environment = child_environment() | {"FASTATTN_CUDA_ARCHS": architecture()}
    start = time.monotonic()
    code = run(BUILD, out / "right-build.log", environment, seconds)
    importlib.invalidate_caches()
    extension.find.cache_clear()
    return {
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "status": extension.status(),
        "unavailable": extension.unavailable(torch.device("cuda", torch.cuda.current_device())),
    }


def run(
    command: Sequence[str], log: Path, environment: Mapping[str, str], seconds: float
) -> int | None:
    """The exit code, or None if the time was over; its processes have ended then."""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, text=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=max(seconds - GRACE, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
            return None
        finally:
            stop(process)


# --- tests ----------------------------------------------------------------------------------------


def run_tests(
    step: Step,
    out: Path,
    seconds: float,
    workers: int,
    patience: float,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Run the tests of a step that have not passed yet, for at most `seconds`."""
    stem = out / f"right-{re.sub(r'[^a-z]+', '-', step.name)}"
    events, passed = stem.with_suffix(".jsonl"), stem.with_suffix(".passed")
    before = ledger.tally(events).passed
    passed.write_text("".join(f"{test}\n" for test in before))
    command = [sys.executable, "-m", "pytest", *step.paths, *step.options, "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-p", "ledger"]
    command += ["--ledger", str(events.resolve()), "--passed", str(passed.resolve())]
    command += ["--patience", str(patience)]
    command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    chosen = child_environment() | environment | step.environment
    chosen["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), chosen["PYTHONPATH"]])
    chosen["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    start = time.monotonic()
    code = run(command, stem.with_suffix(".log"), chosen, seconds)
    found = ledger.tally(events)
    return {
        "command": command[1:],
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "passed_before": len(before),
        "counts": found.counts(),
        "rooms": {path: found.counts(path) for path in step.paths},
        "failures": found.failures,
        "running": found.running,  # when the time was over
    }


def verdict(data: Mapping[str, Any]) -> Verdict:
    """Failures and omissions of the build and of all tests."""
    said = Verdict()
    if (built := data.get("build")) is not None:
        if built["exit_code"] is None:
            said.left_out.append("build: the time was over")
        elif built["exit_code"] != 0 or built["unavailable"] is not None:
            reason = built["unavailable"] or f"exit code {built['exit_code']}"
            said.wrong.append(f"build: the CUDA extension is not there: {reason}")
    for name, result in data["tests"].items():
        if "skipped" in result:
            said.left_out.append(f"{name}: {result['skipped']}")
            continue
        said.wrong += [f"{name}: {test}: {why}" for test, why in result["failures"].items()]
        if result["exit_code"] is None:
            running = f"; then ran {', '.join(result['running'])}" if result["running"] else ""
            said.left_out.append(f"{name}: the time was over before its last test{running}")
        elif result["exit_code"] == NOTHING_TO_RUN and result["passed_before"]:
            continue
        elif result["exit_code"] != 0 and not result["failures"]:
            said.wrong.append(f"{name}: pytest ended with exit code {result['exit_code']}")
    return said


NOTHING_TO_RUN = 5  # pytest's exit code
