"""Test and time fastattn on an NVIDIA GPU: one command, at most nine minutes, no network.

First the tests of the ops, modules, models and swaps on the GPU, then the timings of gpu_parts.py
in one process. Everything goes to OUT: `gpu_check.json` is rewritten after every result, so a kill
loses nothing; `tests-*.log` and `tests-*.xml` are pytest's, `timings.log` is what the timed code
printed. What the time did not suffice for is listed as skipped.

Exit code: 0 all that ran is right, 1 something failed or is wrong, 2 it could not begin,
3 nothing failed but something was skipped for lack of time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from checkout import ROOT
from environment import environment
from gpu_parts import PARTS
from harness import OURS
from results import write_json

ROOMS = ("tests/ops", "tests/nn", "tests/models", "tests/integrations")
REHEARSAL = ("tests/benchmarks/test_timing.py",)
MINUTES = 8.5  # with the start of Python and the last cell less than nine
TESTS_SHARE = 0.35  # of the time, at most
GRACE = 15.0  # seconds that an interrupted pytest has to write its report
STARTING = 60.0  # seconds that the timing process has to import torch and open the GPU
OVERTIME = 10.0  # seconds that a cell in progress may still take when the time is over
TIME_IS_OVER = "the time was over"
RESTARTS = 5
MOST_WORKERS = 8
BACKEND_VARIABLES = ("FASTATTN_BACKEND", "TRITON_INTERPRET")
SCHEMA = "fastattn gpu_check 1"
METHOD = {
    "clock": "CUDA events around batches of calls of at least 2 ms; on the CPU timeit",
    "order": "candidates by turns, every second round backwards; up to 15 rounds",
    "inputs": "normal random, several sets by turns, together larger than the L2",
    "statistics": "median, 20th and 80th percentile over the rounds; ratios inside a round",
    "errors": "against the definition in float64 on the same inputs (gpt: in float32)",
    "flops": "attention 4 B H S^2 D forward, half of it causal, backward 2.5 times forward",
    "bytes": "each tensor read or written once",
}

VERBOSE_LINE = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<test>\S+::.+?)"
    r"|(?P<serial>\S+::.+?) (?P<last>[A-Z]+)(?: \(.*\))? +\[ *\d+%\])\s*$"
)
SUMMARY_LINE = re.compile(r"^(?:FAILED|ERROR) (?P<test>\S+(?:::.+?)?) - (?P<reason>.+)$")


class Report:
    """The results so far, on disk after every change."""

    def __init__(self, path: Path, data: dict) -> None:
        self.path = path
        self.data = data
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data)

    def part(self, name: str) -> dict:
        """The entry of a part of the timings."""
        return self.data["parts"].setdefault(name, {"rows": [], "skipped": []})


# --- tests --------------------------------------------------------------------------------------


def run_tests(room: str, out: Path, seconds: float, workers: int) -> dict[str, object]:
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
            env=child_environment(),
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


def child_environment() -> dict[str, str]:
    """Ours, the checkout first on the path, and nothing that would choose a backend."""
    chosen = {k: v for k, v in os.environ.items() if k not in BACKEND_VARIABLES}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A wide terminal, lest pytest cut the reasons of its failures short.
    wide = {"PYTHONUNBUFFERED": "1", "COLUMNS": "1000"}
    return chosen | {"PYTHONPATH": os.pathsep.join(paths)} | wide


def wait_or_stop(process: subprocess.Popen, seconds: float) -> int | None:
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
    for room in rooms:
        if not (ROOT / room).exists():
            result: dict[str, object] = {"skipped": "there is no such folder"}
        elif end - time.monotonic() < 5:
            result = {"skipped": "no time left for tests"}
        else:
            print(f"== {room}", flush=True)
            result = run_tests(room, out, end - time.monotonic() - GRACE, workers)
            said = result["counts"] or f"no test, exit code {result['exit_code']}"
            print(f"   {said} in {result['seconds']} s", flush=True)
        report.data["tests"][room] = result
        report.save()


# --- timings ------------------------------------------------------------------------------------


def check_timings(report: Report, parts: Sequence[str], device: str, out: Path, end: float) -> None:
    """Run the parts in one process; if it dies or hangs, another goes on behind the guilty cell."""
    remaining, skip = list(parts), 0
    for _ in range(1 + RESTARTS):
        if not remaining or time.monotonic() > end:
            break
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), "--device", device]
        command += ["--seconds", f"{end - time.monotonic():.0f}", "--skip", str(skip)]
        command += ["--parts", *remaining]
        with (out / "timings.log").open("a") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=child_environment(),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
            try:
                part, title, why = follow(process, report, remaining[0], end + OVERTIME)
            finally:
                stop(process)
        if why is None:
            return
        entry = report.part(part)
        if why == TIME_IS_OVER:
            entry["skipped"].append(f"{title}: begun, then {why}")
        else:
            entry["rows"].append({"title": title, "error": why, "right": False})
        report.save()
        print(f"   {title}: {why}", flush=True)
        remaining = remaining[remaining.index(part) :]
        skip = len(entry["rows"]) + len(entry["skipped"])
    for part in remaining:
        report.part(part)["skipped"].append("whatever is not listed: no time left to begin it")
    report.save()


def follow(
    process: subprocess.Popen, report: Report, part: str, end: float
) -> tuple[str, str, str | None]:
    """Take in the events of a timing process.

    Returns:
        The part and the cell where it stopped, and why; the reason is None if it came to its end.
    """
    title, patience = "(start of the process)", STARTING
    arriving = events(process)
    while True:
        left = end - time.monotonic()
        try:
            event = arriving.get(timeout=max(min(patience, left), 0.0))
        except queue.Empty:
            stuck = f"stuck: stopped after {patience:.0f} s without an answer"
            return part, title, stuck if patience < left else TIME_IS_OVER
        if event is None:
            code = process.wait()
            return part, title, None if code == 0 else died(code)
        part = event["part"]
        entry = report.part(part)
        if "cell" in event:
            title, patience = event["cell"], event["limit"]
            continue
        if "row" in event:
            entry["rows"].append(event["row"])
            print("   " + one_line(event["row"]), flush=True)
        elif "skipped" in event:
            entry["skipped"].append(event["skipped"])
        report.save()
        title, patience = f"(after {title})", STARTING


def events(process: subprocess.Popen) -> queue.Queue[dict | None]:
    """The lines of the process as they come, then None."""
    arriving: queue.Queue[dict | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            arriving.put(json.loads(line))
        arriving.put(None)

    threading.Thread(target=read, daemon=True).start()
    return arriving


def stop(process: subprocess.Popen) -> None:
    """Kill what is left of the process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def died(code: int) -> str:
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}; see timings.log"
    return f"the process ended with exit code {code}; see timings.log"


# --- what is said -------------------------------------------------------------------------------


def one_line(row: dict) -> str:
    """A row in one line: our time, and everyone else's as a multiple of it."""
    if "error" in row:
        return f"{row['title']}: FAILED, {row['error']}"
    if "peers" not in row:
        return f"{row['title']}: {rate(row)}"
    ours = row["peers"][OURS]
    if "median_us" not in ours:
        return f"{row['title']}: FAILED, {ours.get('error', 'not timed')}"
    others = []
    for name, entry in row["peers"].items():
        if "times_ours" in entry:
            wrong = "" if entry.get("right", True) else " (wrong)"
            others.append(f"{name} {entry['times_ours']['median']:.2f}x{wrong}")
        elif name != OURS:
            others.append(f"{name} -")
    verdict = "" if row["right"] else " WRONG"
    return f"{row['title']}:{verdict} {rate(ours)}; time of {', '.join(others)}"


def rate(entry: dict) -> str:
    text = f"{entry['median_us']:.1f} us"
    for key, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s"), ("tokens_per_second", "tokens/s")):
        if key in entry:
            text += f", {entry[key]:.4g} {unit}"
    for key, share in entry.items():
        if key.startswith("share_of_"):
            text += f" ({share:.0%} of {key.removeprefix('share_of_')})"
    return text


def verdict(data: dict) -> dict[str, object]:
    """What failed, what is wrong and what was left out, over all tests and rows."""
    failed, skipped = [], []
    for room, result in data["tests"].items():
        if "skipped" in result:
            skipped.append(f"{room}: {result['skipped']}")
            continue
        failed += result["failures"]
        if not result["finished"]:
            skipped.append(f"{room}: the time was over before its last test")
        elif result["exit_code"] not in (0, 1):
            failed.append(f"{room}: pytest ended with exit code {result['exit_code']}")
    for part, result in data["parts"].items():
        failed += [f"{part}: {row['title']}" for row in result["rows"] if not row["right"]]
        skipped += [f"{part}: {title}" for title in result["skipped"]]
    code = 1 if failed else 3 if skipped else 0
    return {"exit_code": code, "failed": failed, "skipped": skipped}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="results")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda", help="cpu: tiny, to rehearse"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"time for all (default {MINUTES})"
    )
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="of the timings"
    )
    parser.add_argument("--tests", nargs="*", metavar="PATH", help="folders or files of tests")
    parser.add_argument("--commit", help="the commit, where the checkout cannot tell")
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
    (out / "timings.log").write_text("")

    report = Report(
        out / "gpu_check.json",
        {
            "schema": SCHEMA,
            "script": "gpu_check",
            "environment": environment(device, commit=arguments.commit),
            "method": METHOD,
            "minutes": arguments.minutes,
            "tests": {},
            "parts": {},
            "verdict": None,
        },
    )
    # Tests first, though never more than their share while there is something to time.
    share = TESTS_SHARE if arguments.parts else 1.0
    check_tests(report, rooms, out, start + share * (end - start), workers)
    print("== timings", flush=True)
    check_timings(report, arguments.parts, device, out, end)

    summary = verdict(report.data)
    report.data["verdict"] = summary | {"seconds": round(time.monotonic() - start, 1)}
    report.save()
    for kind in ("failed", "skipped"):
        if summary[kind]:
            print(f"\n{kind} ({len(summary[kind])}):\n  " + "\n  ".join(summary[kind]))
    print(f"\n{time.monotonic() - start:.0f} s; results: {report.path}")
    return summary["exit_code"]


if __name__ == "__main__":
    raise SystemExit(main())
