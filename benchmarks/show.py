"""What a run shows: progress while it goes on, then who wins by how much."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from schema import Entry, Results, Row, Spread

OURS = "ours"
TIE = 0.02  # medians that differ by less are equal, whatever the spread


def verdict(times_ours: Spread) -> str:
    """Of a peer's time over ours: "tie" where the rounds do not decide, else a factor."""
    if is_tie(times_ours):
        return "tie"
    return f"{times_ours['median']:.2f}x"


def is_tie(times_ours: Spread) -> bool:
    """Whether 1 lies in the spread of the rounds, or the medians are as good as equal."""
    within = times_ours["p20"] <= 1.0 <= times_ours["p80"]
    return within or 1.0 - TIE <= times_ours["median"] <= 1.0 + TIE


def rate(entry: Entry, bound: str = "") -> str:
    """A time and what it means: the rate, its share of the ceiling."""
    text = f"{entry['median_us']:.1f} us"
    for key, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s"), ("tokens_per_second", "tokens/s")):
        if key in entry:
            text += f", {entry[key]:.4g} {unit}"  # type: ignore[literal-required]
    if "share" in entry and bound:
        text += f" ({entry['share']:.0%} of {bound})"
    if "mfu" in entry:
        text += f" ({entry['mfu']:.1%} MFU)"
    return text


def fastest(row: Row) -> tuple[str, Entry] | None:
    """The right peer, not ours and no ceiling, that takes the least time."""
    able = {
        name: entry
        for name, entry in row.get("peers", {}).items()
        if name != OURS and "times_ours" in entry and entry.get("right", True)
        and not entry.get("ceiling")
    }  # fmt: skip
    if not able:
        return None
    return min(able.items(), key=lambda item: item[1]["times_ours"]["median"])


def against(row: Row) -> str:
    """Who wins the row by how much; in microseconds where that is what counts."""
    for name, entry in row.get("peers", {}).items():
        if "above_us" in entry:
            return f"ours {entry['above_us']['median']:+.1f} us against {name}"
    best = fastest(row)
    if best is None:
        return ""
    name, times_ours = best[0], best[1]["times_ours"]
    if is_tie(times_ours):
        return f"tie with {name}"
    if times_ours["median"] > 1.0:
        return f"ours by {times_ours['median']:.2f}x before {name}"
    return f"{name} by {1.0 / times_ours['median']:.2f}x"


def one_line(row: Row) -> str:
    """A row in one line: our time, and everyone else's as a multiple of it."""
    if "error" in row:
        return f"{row['title']}: FAILED, {row['error']}"
    ours = row["peers"].get(OURS, {})
    if "error" in ours:
        return f"{row['title']}: FAILED, {ours['error']}"
    others = []
    for name, entry in row["peers"].items():
        if "times_ours" in entry:
            wrong = "" if entry.get("right", True) else " (wrong)"
            others.append(f"{name} {verdict(entry['times_ours'])}{wrong}")
        elif name != OURS and "peak_bytes" not in entry:
            others.append(f"{name} -")
    said = [_measured(ours, row)] if _measured(ours, row) else []
    said += [f"time of {', '.join(others)}"] if others else []
    said += [missed] if (missed := _missed(row)) else []
    return f"{row['title']}:{'' if row['right'] else ' WRONG;'} {'; '.join(said)}"


def _measured(entry: Entry, row: Row) -> str:
    text = rate(entry, row.get("bound", "")) if "median_us" in entry else ""
    for key in ("peak_bytes", "saved_bytes"):
        if key in entry:
            size = f"{entry[key] / 2**20:.1f} MiB {key.removesuffix('_bytes')}"  # type: ignore[literal-required]
            text += f", {size}" if text else size
    return text


def _missed(row: Row) -> str:
    return f"MISSED: {row.get('target')}" if row.get("holds") is False else ""


def summary(results: Results) -> str:
    """The table at the end of a run, and what it comes to."""
    rows = []
    for row in results["rows"]:
        if "error" in row or "error" in row["peers"].get(OURS, {}):
            why = row.get("error") or row["peers"][OURS]["error"]
            rows.append((row["title"], "FAILED", why))
            continue
        said = [against(row), _missed(row), "" if row["right"] else "WRONG"]
        measured = _measured(row["peers"].get(OURS, {}), row)
        rows.append((row["title"], measured, "; ".join(filter(None, said))))
    lines = [table(("", OURS, "who wins"), rows)]
    lines += [f"left out: {skipped['title']}: {skipped['why']}" for skipped in results["skipped"]]
    lines += standings(results["rows"])
    return "\n".join(lines)


def standings(rows: Sequence[Row]) -> list[str]:
    """Against each peer, where it is right: wins, ties, losses, the geometric mean of its time."""
    import numpy

    met: dict[str, list[tuple[Spread, str]]] = {}
    refused: dict[str, str] = {}
    for row in rows:
        for name, entry in row.get("peers", {}).items():
            if "refused" in entry:
                refused.setdefault(name, entry["refused"])
            if "times_ours" in entry and entry.get("right", True) and not entry.get("ceiling"):
                met.setdefault(name, []).append((entry["times_ours"], row["title"]))
    lines = []
    for name, rated in met.items():
        spreads = [spread for spread, _ in rated]
        ties = sum(map(is_tie, spreads))
        won = sum(not is_tie(s) and s["median"] > 1.0 for s in spreads)
        mean = float(numpy.exp(numpy.mean(numpy.log([s["median"] for s in spreads]))))
        worst, title = min((spread["median"], title) for spread, title in rated)
        lines.append(
            f"against {name}: {won} won, {ties} tied within noise, {len(spreads) - won - ties} "
            f"lost; its time over ours: geometric mean {mean:.2f}, worst {worst:.2f} ({title})"
        )
    lines += [f"{name} took no part: {why}" for name, why in refused.items() if name not in met]
    targets = [row for row in rows if "holds" in row]
    if targets:
        held = sum(row["holds"] for row in targets)
        lines.append(f"targets: {held} of {len(targets)} rows hold")
    return lines


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])


class Progress:
    """A bar while rows are measured, where rich is installed and somebody watches; else lines."""

    def __init__(self, name: str, rows: int) -> None:
        self._name, self._rows, self._seen = name, rows, 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return self
            columns = progress.TextColumn("{task.description}"), progress.BarColumn()
            columns += progress.MofNCompleteColumn(), progress.TimeElapsedColumn()  # type: ignore[assignment]
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self._name, total=self._rows)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, title: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=title[:60])

    def row(self, row: Row) -> None:
        self._seen += 1
        if self._bar is not None:
            self._bar.advance(self._task)
            self._bar.console.print(one_line(row), highlight=False)
        else:
            print(f"[{self._seen}/{self._rows}] {one_line(row)}", file=sys.stderr, flush=True)
