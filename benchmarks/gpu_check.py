"""Test and time fastattn on an NVIDIA GPU: one command, at most nine minutes, no network.

First the CUDA extension is built for this GPU, where nvcc is. Then come the conformance programs,
which hold the emulator of its kernels to the GPU, the tests of the ops, modules, models and swaps,
and every subject of the benchmarks with one preset. Everything goes to OUT:
`<subject>-<preset>.json` has a subject's rows (schema.py), written after each one, and
`gpu_check.json` the tests and what it all comes to. The same command again goes on where the last
one stopped; with `--preset full --tests` (no folder of tests), which is `make gpu-bench`, that is
how hours of rows are measured in parts.

Exit code: 0 all that ran is right, 1 something failed, is wrong or missed its target, 2 it could
not begin, 3 nothing failed but something was left out for lack of time: run it again.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import script
import torch
from checkout import ROOT
from environment import environment
from schema import SchemaError, read, write_json
from supervise import child_environment, stop

from fastattn import extension

ROOMS = ("tests/conformance", "tests/ops", "tests/nn", "tests/models", "tests/integrations")
REHEARSAL = ("tests/benchmarks/test_timing.py",)
MINUTES = 8.5  # with the start of Python and the last row less than nine
TESTS_SHARE = 0.3  # of the time, at most
GRACE = 15.0  # seconds that an interrupted pytest has to write its report
MOST_WORKERS = 8
SCHEMA = "fastattn gpu_check 2"

# In order of value, with the seconds that the quick preset of each may take.
SUBJECTS = {
    "attention": 80,
    "decode": 25,
    "layer_norm": 35,
    "ffn": 30,
    "gpt_train": 65,
    "gpt_generate": 55,
    "never_slower": 30,
    "memory": 20,
    "overhead": 15,
}

BUILD_SECONDS = 150.0

VERBOSE_LINE = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<test>\S+::.+?)"
    r"|(?P<serial>\S+::.+?) (?P<last>[A-Z]+)(?: \(.*\))? +\[ *\d+%\])\s*$"
)
SUMMARY_LINE = re.compile(r"^(?:FAILED|ERROR) (?P<test>\S+(?:::.+?)?) - (?P<reason>.+)$")


class Report:
    """The results so far, on disk after every change."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data)


# --- the extension --------------------------------------------------------------------------------


def build_extension(out: Path, seconds: float) -> dict[str, Any]:
    """Build it for this GPU, into the checkout; only what has changed is compiled."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"
    log = out / "extension.log"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_environment() | {"FASTATTN_CUDA_ARCHS": arch},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = wait_or_stop(process, seconds)
        finally:
            stop(process)
    importlib.invalidate_caches()
    extension.find.cache_clear()
    return {
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        "status": extension.status(),
    }


# --- tests --------------------------------------------------------------------------------------


def run_tests(room: str, out: Path, seconds: float, workers: int) -> dict[str, Any]:
    """Run one folder of tests for at most `seconds`; the counts and the failures.

    The log is read, not pytest's report: it is there even if pytest had to be killed.
    """
    name = re.sub(r"\W+", "-", room.removesuffix(".py")).strip("-")
    log, junit = out / f"{name}.log", out / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", room, "-v", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", f"--junitxml={junit.resolve()}"]
    command += ["-n", str(workers)] if workers > 1 else []
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment() | {"COLUMNS": "1000"},  # lest pytest cut its reasons short
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = wait_or_stop(process, seconds)
        finally:
            stop(process)
    counts, failures = read_log(log.read_text(errors="replace"))
    return {
        "command": command[1:],
        "exit_code": code,
        "finished": code is not None,
        "seconds": round(time.monotonic() - start, 1),
        "counts": counts,
        "failures": failures,
    }


def wait_or_stop(process: subprocess.Popen[Any], seconds: float) -> int | None:
    """The exit code, or None if the time was over and the process group had to be stopped."""
    try:
        return process.wait(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def read_log(text: str) -> tuple[dict[str, int], dict[str, str]]:
    """Counts by outcome, and the reason of every failing test, from a verbose log of pytest."""
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    for line in text.splitlines():
        if match := VERBOSE_LINE.match(line):
            outcome = (match["first"] or match["last"]).lower()
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome in ("failed", "error"):
                failures.setdefault(match["test"] or match["serial"], "")
        elif match := SUMMARY_LINE.match(line):
            failures[match["test"]] = match["reason"][:500]
    return counts, failures


def check_tests(report: Report, rooms: Sequence[str], out: Path, end: float, workers: int) -> None:
    """Run the rooms that no earlier run has finished without a failure."""
    tests = report.data["tests"]
    for room in rooms:
        if tests.get(room, {}).get("exit_code") == 0:
            print(f"== {room}: passed before", flush=True)
            continue
        if not (ROOT / room).exists():
            result: dict[str, Any] = {"skipped": "there is no such folder"}
        elif end - time.monotonic() < 5:
            result = {"skipped": "no time left for tests"}
        else:
            print(f"== {room}", flush=True)
            result = run_tests(room, out, end - time.monotonic() - GRACE, workers)
            said = result["counts"] or f"no test, exit code {result['exit_code']}"
            print(f"   {said} in {result['seconds']} s", flush=True)
        tests[room] = result
        report.save()


# --- timings --------------------------------------------------------------------------------------


def check_subjects(
    report: Report,
    subjects: Sequence[str],
    device: str,
    preset: str,
    out: Path,
    end: float,
    options: Sequence[str],
) -> None:
    """Have every subject measured; a quick preset has its share of the time, the others all."""
    for name in subjects:
        left = end - time.monotonic()
        if preset == "quick" and device == "cuda":
            left = min(left, SUBJECTS[name])
        file = out / f"{name}-{preset}.json"
        entry: dict[str, Any] = {"file": file.name}
        report.data["subjects"][name] = entry
        if left < 5:
            entry["skipped"] = "no time left to begin it"
        else:
            print(f"== {name}", flush=True)
            subject = importlib.import_module(name).SUBJECT
            arguments = ["--device", device, "--preset", preset, "--json", str(file), "--resume"]
            entry["exit_code"] = measure(
                subject, [*arguments, *options, "--minutes", f"{left / 60}"]
            )
            if file.exists():
                entry |= outcome(file)
        report.save()


def measure(subject: script.Subject, arguments: Sequence[str]) -> int:
    """The exit code of a subject's script."""
    try:
        return script.main(subject, arguments)
    except SystemExit as refused:  # argparse: it could not begin
        return int(refused.code or 0)


def outcome(file: Path) -> dict[str, Any]:
    """What a subject's file comes to."""
    try:
        results = read(file)
    except SchemaError as failure:
        return {"error": str(failure)}
    failed = [
        row["title"] for row in results["rows"] if not row["right"] or row.get("holds") is False
    ]
    return {
        "rows": len(results["rows"]),
        "failed": failed,
        "left_out": [skipped["title"] for skipped in results["skipped"]],
    }


def verdict(data: dict[str, Any]) -> dict[str, Any]:
    """What failed, what is wrong and what was left out, over all tests and rows."""
    failed, skipped = [], []
    built = data.get("extension")
    if built is not None and built["exit_code"] != 0:
        failed.append(f"the CUDA extension did not build: {built['status']}")
    for room, result in data["tests"].items():
        if "skipped" in result:
            skipped.append(f"{room}: {result['skipped']}")
            continue
        failed += result["failures"]
        if not result["finished"]:
            skipped.append(f"{room}: the time was over before its last test")
        elif result["exit_code"] not in (0, 1):
            failed.append(f"{room}: pytest ended with exit code {result['exit_code']}")
    for name, entry in data["subjects"].items():
        if "skipped" in entry:
            skipped.append(f"{name}: {entry['skipped']}")
        if "error" in entry or entry.get("exit_code") == 2:
            failed.append(f"{name}: {entry.get('error', 'it could not begin')}")
        failed += [f"{name}: {title}" for title in entry.get("failed", ())]
        skipped += [f"{name}: {title}" for title in entry.get("left_out", ())]
    code = 1 if failed else 3 if skipped else 0
    return {"exit_code": code, "failed": failed, "skipped": skipped}


def before(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """The tests of an earlier run on the same code and device."""
    try:
        old = json.loads(path.read_text())
        same = all(
            old["environment"][name] == data["environment"][name]
            for name in ("device", "commit", "modified")
        )
        return old["tests"] if same and old["schema"] == SCHEMA else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="results")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to rehearse")
    add("--preset", choices=script.PRESETS, default="quick", help="of the subjects")
    add("--minutes", type=float, default=MINUTES, help=f"for all; default: {MINUTES}")
    add("--subjects", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS), help="to time")
    add("--tests", nargs="*", metavar="PATH", help="folders or files of tests; none: no tests")
    add("--commit", help="the commit measured, where the checkout cannot tell")
    add("--seconds", help="to time a row for; default by subject")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch; --device cpu rehearses without one")
    start = time.monotonic()
    end = start + 60 * arguments.minutes
    device, out = arguments.device, arguments.out
    rooms = arguments.tests
    if rooms is None:
        rooms = ROOMS if device == "cuda" else REHEARSAL
    workers = 1
    if device == "cuda" and importlib.util.find_spec("xdist") is not None:
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
    out.mkdir(parents=True, exist_ok=True)

    path = out / "gpu_check.json"
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment(device, commit=arguments.commit),
        "preset": arguments.preset,
        "minutes": arguments.minutes,
        "tests": {},
        "subjects": {},
        "verdict": None,
    }
    data["tests"] = before(path, data)
    report = Report(path, data)
    if device == "cuda" and rooms:
        print("== the CUDA extension", flush=True)
        data["extension"] = build_extension(out, min(BUILD_SECONDS, end - time.monotonic()))
        print(f"   {data['extension']['status']}", flush=True)
        report.save()
    # Tests first, though never more than their share while there is something to time.
    share = TESTS_SHARE if arguments.subjects else 1.0
    check_tests(report, rooms, out, start + share * (end - start), workers)
    options = [] if arguments.commit is None else ["--commit", arguments.commit]
    options += [] if arguments.seconds is None else ["--seconds", arguments.seconds]
    check_subjects(report, arguments.subjects, device, arguments.preset, out, end, options)
    data["verdict"] = said = verdict(data)
    data["seconds"] = round(time.monotonic() - start, 1)
    report.save()
    print(f"== {data['seconds']:.0f} s; results in {path}")
    for word in ("failed", "skipped"):
        for name in said[word]:
            print(f"   {word}: {name}")
    if said["exit_code"] == 3:
        print("   the same command again goes on from here")
    return said["exit_code"]


if __name__ == "__main__":
    raise SystemExit(main())
