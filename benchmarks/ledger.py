"""A pytest plugin: writes each test down as it begins and ends, leaves out what passed before.

    pytest -p ledger --ledger FILE --passed FILE --patience SECONDS PATHS

The ledger is there even if pytest has to be killed, and it names the tests that were running then.
Files of the PATHS take turns, so that a run that is cut short has seen something of each. A process
of pytest-xdist ends if a test takes too long in it, or has broken the GPU's context, so that
others do not wait or fail for it; the test has failed, and xdist starts another process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("ledger").addoption
    add("--ledger", type=Path, required=True, help="append to this file, a line an event")
    add("--passed", type=Path, required=True, help="leave out these tests, one a line")
    add("--patience", type=float, required=True, help="seconds that a test may take")


def pytest_configure(config: pytest.Config) -> None:
    passed = frozenset(config.getoption("passed").read_text().splitlines())
    config.pluginmanager.register(_Selection(passed))
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker(config.getoption("patience")))
    else:
        config.pluginmanager.register(_Writer(config.getoption("ledger")))


class _Selection:
    def __init__(self, passed: frozenset[str]) -> None:
        self.passed = passed

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        out = [item for item in items if item.nodeid in self.passed]
        config.hook.pytest_deselected(items=out)
        items[:] = alternating(
            [item for item in items if item.nodeid not in self.passed],
            [config.invocation_params.dir / argument for argument in config.args],
        )


def alternating(items: list[pytest.Item], rooms: list[Path]) -> list[pytest.Item]:
    """The first file of every room, then the second one of every room, and so on."""
    files: dict[int, dict[Path, int]] = defaultdict(dict)

    def turn(item: pytest.Item) -> tuple[int, int]:
        within = (n for n, room in enumerate(rooms) if item.path.is_relative_to(room))
        room = next(within, len(rooms))
        return files[room].setdefault(item.path, len(files[room])), room

    return sorted(items, key=turn)


class _Writer:
    """In the process that hears of all tests."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.write(starts="pytest")

    def write(self, **event: str) -> None:
        self.file.write(json.dumps(event) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(begins=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        before, _ = self.outcomes.get(test, ("", ""))
        if report.failed and before not in ("failed", "error"):
            outcome = "failed" if report.when == "call" else "error"
            self.outcomes[test] = (outcome, reason(report))
        elif report.skipped or report.when == "call":
            self.outcomes[test] = (report.outcome, "")
        if report.when not in ("setup", "call"):  # teardown, or the end of a worker that crashed
            outcome, why = self.outcomes.pop(test)
            self.write(test=test, outcome=outcome, reason=why)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="error", reason=reason(report))


class _Worker:
    def __init__(self, patience: float) -> None:
        self.patience = patience

    def pytest_runtest_logstart(self) -> None:
        faulthandler.dump_traceback_later(self.patience, exit=True, file=sys.__stderr__)

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and context_lost():
            os._exit(1)


def context_lost() -> bool:
    """Whether every further call of CUDA in this process must fail."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def reason(report: Any) -> str:
    """The failure, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    return " ".join(text.split())[:500]


@dataclass
class Tally:
    """A summary of a ledger.

    Attributes:
        outcomes: by test, the last one: "passed", "failed", "error", "skipped", "xfailed", ...
        failures: the reason of every test that failed.
        running: tests that began and did not end.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)

    @property
    def passed(self) -> list[str]:
        return [test for test, outcome in self.outcomes.items() if outcome == "passed"]

    def counts(self, place: str = "") -> dict[str, int]:
        """How many tests had which outcome, of those whose names begin with `place`."""
        counts: dict[str, int] = {}
        for test, outcome in self.outcomes.items():
            if test.startswith(place):
                counts[outcome] = counts.get(outcome, 0) + 1
        return counts


def tally(path: Path) -> Tally:
    """Read a ledger; one that is not there is empty, and a line that was cut off is left out."""
    found = Tally()
    running: dict[str, None] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if "starts" in event:
            running.clear()  # of an earlier run
            continue
        if "begins" in event:
            running[event["begins"]] = None
            continue
        test = event["test"]
        running.pop(test, None)
        found.outcomes[test] = event["outcome"]
        found.failures.pop(test, None)
        if event["outcome"] in ("failed", "error"):
            found.failures[test] = event["reason"]
    found.running = list(running)
    return found
