"""Measuring in another process: cells that hang, crash or take too long."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import supervise
from schema import Row, check

# A measuring process: knows what the cells a, b, ... do, and which ones to skip.
PROGRAM = """
import json, os, sys, time
skip = sys.argv[sys.argv.index("--skip") + 1:]
def say(**event): print(json.dumps(event), flush=True)
for number, title in enumerate(TITLES):
    if str(number) in skip: continue
    say(cell=title, limit=LIMIT)
    exec(DO.get(title, ""))
    say(row=dict(title=title, op="x", direction="", dtype="", axes={}, right=True))
"""


def measured(
    titles: str, do: dict[str, str], *, limit: float = 60, end: float | None = None, done: str = ""
) -> list[Any]:
    program = f"TITLES, DO, LIMIT = {list(titles)!r}, {do!r}, {limit}\n{PROGRAM}"
    rows: Sequence[Row] = [supervise.broken(title, "") for title in done]
    command = [sys.executable, "-c", program]
    return list(supervise.measure(command, list(titles), rows, end))


def short(events: list[Any]) -> list[str]:
    """Titles of rows; with "!" of broken ones, with "-" of what was left out."""
    marks = {True: "!", False: ""}
    return [
        f"{e['title']}-" if "why" in e else f"{e['title']}{marks['error' in e]}"
        for e in events
        if not isinstance(e, str)
    ]


def test_rows_come_in_order_each_announced() -> None:
    events = measured("abc", {})
    assert [e if isinstance(e, str) else e["title"] for e in events] == ["a", "a", "b", "b", "c", "c"]  # fmt: skip


def test_rows_that_are_there_are_not_measured_again() -> None:
    assert short(measured("abc", {"b": "os.abort()"}, done="b")) == ["a", "c"]
    assert measured("ab", {}, done="ab") == []


@pytest.mark.parametrize(
    ("deed", "why"),
    [
        ("os.abort()", "the process was ended by SIGABRT"),
        ("sys.exit(7)", "the process ended with exit code 7"),
        ("time.sleep(1000)", "stuck: stopped after 2 s without an answer"),
    ],
)
def test_another_process_goes_on_after_a_cell_that_broke(deed: str, why: str) -> None:
    events = measured("abc", {"b": deed}, limit=2)
    assert short(events) == ["a", "b!", "c"]
    broken = next(e for e in events if not isinstance(e, str) and "error" in e)
    assert broken["error"] == why and not broken["right"]
    check(broken, Row)


def test_what_the_time_does_not_suffice_for_is_left_out_not_broken() -> None:
    events = measured("abc", {"a": "time.sleep(2)"}, end=time.monotonic() + 1)
    assert short(events) == ["a", "b-", "c-"]
    assert {e["why"] for e in events[-2:]} == {supervise.TIME_IS_OVER}
    assert short(measured("ab", {}, end=time.monotonic() - 1)) == ["a-", "b-"]


def test_a_cell_in_progress_is_stopped_some_time_after_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervise, "OVERTIME", 1.0)
    start = time.monotonic()
    events = measured("ab", {"a": "time.sleep(1000)"}, end=start + 1)
    assert short(events) == ["a-", "b-"]
    assert time.monotonic() - start < 30


def test_no_process_is_left(tmp_path: Path) -> None:
    """Nor what it started."""
    note = tmp_path / "late"
    late = f"import time; time.sleep(3); open({str(note)!r}, 'w')"
    command = f"[sys.executable, '-c', {late!r}]"
    start = f"import subprocess; subprocess.Popen({command}, stdout=-3); os._exit(9)"
    measured("a", {"a": start})
    time.sleep(4)
    assert not note.exists()


def test_the_child_chooses_its_backends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not set(supervise.BACKEND_VARIABLES) & supervise.child_environment().keys()
