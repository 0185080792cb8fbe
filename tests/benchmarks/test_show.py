"""The table of a run: who is faster, who ties, who took no part; it fits 100 columns."""

from __future__ import annotations

from typing import Any

import pytest
import show


def entry(median: float = 1.0, p20: float | None = None, p80: float | None = None, **more: Any) -> Any:  # fmt: skip
    """A peer whose time is `median` times ours."""
    times_ours = {"median": median, "p20": p20 or median, "p80": p80 or median}
    return {"median_us": 10 * median, "times_ours": times_ours, "right": True, **more}


def row(**peers: Any) -> Any:
    said = {"title": "cell", "op": "norm", "direction": "forward", "dtype": "float32"}
    peers = {"ours": {"median_us": 10.0, "right": True}, **peers}
    return {**said, "axes": {}, "right": True, "peers": peers}


def summary(*rows: Any, skipped: Any = ()) -> list[str]:
    return show.summary({"rows": list(rows), "skipped": list(skipped)}).splitlines()  # type: ignore[typeddict-item]


def test_one_line_has_everyone() -> None:
    shown = row(
        fast=entry(1.5), wrong=entry(0.5, right=False), absent={"refused": "no"},
        copy=entry(0.5, ceiling=True),
    ) | {"bound": "copy"}  # fmt: skip
    shown["peers"]["ours"] |= {"gbps": 100.0, "share": 0.5}
    assert show.one_line(shown) == (
        "cell: 10.0 us ours; 100 GB/s; 50% of copy; time of fast 1.50x, wrong 0.50x wrong, copy 0.50x"
    )
    assert show.one_line({"title": "cell", "error": "crashed", "right": False}) == "cell: FAILED, crashed"  # type: ignore[typeddict-item]  # fmt: skip
    assert "FAILED, OutOfMemoryError" in show.one_line(row() | {"peers": {"ours": {"error": "OutOfMemoryError"}}})  # fmt: skip
    missed = row() | {"right": False, "target": "fast enough", "holds": False}
    assert show.one_line(missed) == "cell: WRONG; 10.0 us ours; MISSED: fast enough"


def test_a_row_a_line_and_a_column_a_peer() -> None:
    rows = [
        row(fast=entry(2.0), other={"refused": "not here"}),
        row(fast=entry(1.0), other=entry(0.5)),
    ]
    for n, each in enumerate(rows):
        each |= {"axes": {"n": n, "m": 7}, "bound": "copy"}
        each["peers"]["ours"]["share"] = 0.5
        each["peers"]["copy"] = entry(0.5, ceiling=True)
    assert summary(*rows)[:6] == [
        "norm forward float32 m=7; a peer's time over ours:",
        "                of",
        "        ours  copy   fast  other",
        "--------------------------------",
        "n=0  10.0 us   50%  2.00x      -",
        "n=1  10.0 us   50%    tie  0.50x",
    ]


def test_it_fits_its_width() -> None:
    """Long shapes take several lines; peers that do not fit have a table of their own."""
    peers = {f"a long name {n}": entry(1.5) for n in range(20)}
    rows = [row(**peers) | {"axes": {f"axis{i}": n for i in range(30)}} for n in range(2)]
    lines = summary(*rows)
    assert max(map(len, lines)) <= show.WIDTH
    assert sum(line.count("1.50x") for line in lines) == 20 * (2 + 2)  # rows, mean and worst
    assert sum(line.count("10.0 us") for line in lines) == 2


def test_wins_ties_losses_and_who_took_no_part() -> None:
    absent = {name: {"refused": f"{name} is not installed"} for name in ("flash", "xformers")}
    rows = [
        row(peer=entry(2.0)), row(peer=entry(1.0)), row(peer=entry(0.5)),
        row(peer=entry(9.0, right=False), slow={"refused": "no backward"}, **absent),
        row() | {"target": "fast", "holds": True}, row() | {"target": "fast", "holds": False},
    ]  # fmt: skip
    lines = show.standings(rows)
    assert lines == [
        "",
        "against  faster / tie / slower  mean   worst",
        "-" * 46,
        "peer     1 / 1 / 1              1.00x  0.50x -",
        "",
        "not installed: flash, xformers",
        "slow, 1 of 6 rows: no backward",
        "1 of 2 rows hold their target: fast",
    ]


def test_nothing_that_went_wrong_is_hidden() -> None:
    broken = {**row(), "title": "broken", "error": "crashed", "right": False}
    missed = {**row(), "title": "slow", "holds": False, "target": "fast"}
    wrong = {**row(), "title": "bad", "right": False}
    late = {"title": "late", "why": "the time was over"}
    lines = summary(row(peer=entry(2.0)), broken, missed, wrong, skipped=[late])
    for said in ("FAILED: broken: crashed", "MISSED: slow: fast", "WRONG: bad", "left out: late: the time was over"):  # fmt: skip
        assert said in lines


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with show.Progress("ffn", 2) as progress:
        progress.begin("cell")
        progress.row(row())
    assert capsys.readouterr().err == "[1/2] cell: 10.0 us ours\n"


def test_progress_for_a_watcher_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with show.Progress("ffn", 2) as progress:
        progress.begin("cell")
        progress.row(row())
        assert progress._bar.tasks[0].completed == 1
