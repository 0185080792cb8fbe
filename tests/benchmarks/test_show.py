"""Who wins, who ties, who lost: what the table says of rows that are known."""

from __future__ import annotations

from typing import Any

import pytest
import show


def entry(median: float = 1.0, p20: float | None = None, p80: float | None = None, **more: Any) -> Any:  # fmt: skip
    """A peer whose time is `median` times ours."""
    times_ours = {"median": median, "p20": p20 or median, "p80": p80 or median}
    return {"median_us": 10 * median, "times_ours": times_ours, "right": True, **more}


def row(**peers: Any) -> Any:
    ours = {"median_us": 10.0, "right": True}
    return {"title": "cell", "right": True, "peers": {"ours": ours, **peers}}


@pytest.mark.parametrize(
    ("spread", "said"),
    [
        ((1.32, 1.30, 1.35), "1.32x"),
        ((1.32, 0.99, 1.60), "tie"),  # the rounds do not decide
        ((1.02, 1.015, 1.03), "tie"),  # they do, but by less than anyone feels
        ((0.98, 0.97, 0.99), "tie"),
        ((0.90, 0.85, 0.95), "0.90x"),
        ((1.10, 1.00, 1.20), "tie"),
    ],
)
def test_a_tie_is_said_to_be_one(spread: tuple[float, ...], said: str) -> None:
    assert show.verdict(entry(*spread)["times_ours"]) == said


def test_the_winner_is_named_among_those_that_are_right() -> None:
    peers = {
        "slow": entry(3.0),
        "fast": entry(1.5),
        "wrong": entry(0.5, right=False),
        "copy": entry(0.1, ceiling=True),
        "absent": {"refused": "not installed"},
    }
    assert show.against(row(**peers)) == "ours by 1.50x before fast"
    assert show.against(row(fast=entry(0.5))) == "fast by 2.00x"
    assert show.against(row(fast=entry(1.01))) == "tie with fast"
    assert show.against(row()) == ""


def test_one_line_has_everyone() -> None:
    shown = row(
        fast=entry(1.5), wrong=entry(0.5, right=False), absent={"refused": "no"},
        copy=entry(0.5, ceiling=True),
    ) | {"bound": "copy"}  # fmt: skip
    shown["peers"]["ours"] |= {"gbps": 100.0, "share": 0.5}
    assert show.one_line(shown) == (
        "cell: 10.0 us, 100 GB/s (50% of copy); "
        "time of fast 1.50x, wrong 0.50x (wrong), absent -, copy 0.50x"
    )
    assert show.one_line({"title": "cell", "error": "crashed", "right": False}) == "cell: FAILED, crashed"  # type: ignore[typeddict-item]  # fmt: skip
    assert "FAILED, OutOfMemoryError" in show.one_line(row() | {"peers": {"ours": {"error": "OutOfMemoryError"}}})  # fmt: skip
    missed = row() | {"right": False, "target": "fast enough", "holds": False}
    assert show.one_line(missed) == "cell: WRONG; 10.0 us; MISSED: fast enough"


def test_standings_count_wins_ties_and_losses() -> None:
    rows = [
        row(peer=entry(2.0)), row(peer=entry(1.0)), row(peer=entry(0.5)),
        row(peer=entry(9.0, right=False), absent={"refused": "not installed"}),
        row() | {"holds": True}, row() | {"holds": False},
    ]  # fmt: skip
    lines = show.standings(rows)
    assert lines[0] == (
        "against peer: 1 won, 1 tied within noise, 1 lost; "
        "its time over ours: geometric mean 1.00, worst 0.50 (cell)"
    )
    assert "absent took no part: not installed" in lines
    assert "targets: 1 of 2 rows hold" in lines


def test_summary_hides_nothing() -> None:
    results: Any = {
        "rows": [row(peer=entry(2.0)), {"title": "broken", "error": "crashed", "right": False}],
        "skipped": [{"title": "late", "why": "the time was over"}],
    }
    text = show.summary(results)
    assert "ours by 2.00x before peer" in text
    assert "broken" in text and "crashed" in text
    assert "left out: late: the time was over" in text


def test_table_aligns_its_columns() -> None:
    lines = show.table(("op", "us"), [("norm", 1.5), ("attention", 12)]).splitlines()
    assert lines == ["op         us", "-" * 14, "norm       1.5", "attention  12"]


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with show.Progress("ffn", 2) as progress:
        progress.begin("cell")
        progress.row(row())
    assert capsys.readouterr().err == "[1/2] cell: 10.0 us\n"


def test_progress_for_a_watcher_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with show.Progress("ffn", 2) as progress:
        progress.begin("cell")
        progress.row(row())
        assert progress._bar.tasks[0].completed == 1
