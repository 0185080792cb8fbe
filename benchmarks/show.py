"""The output of a run: progress while it goes on, then a table that fits WIDTH columns."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from facts import (
    OURS,
    RATES,
    absent,
    against,
    axes_text,
    brief,
    competitors,
    digits,
    duration,
    entry_of,
    failed,
    memory,
    peers_of,
    ratio,
    split_axes,
    spread,
)
from schema import Results, Row

WIDTH = 100
LEAST_SHAPE = 16  # columns of what tells the rows apart; longer texts take several lines
NOT_INSTALLED = " is not installed"  # how such a refusal ends


# --- one row --------------------------------------------------------------------------------------


def one_line(row: Row) -> str:
    """A row in one line: our time, and everyone else's as a multiple of it."""
    ours = entry_of(row, OURS)
    if (why := row.get("error") or ours.get("error")) is not None:
        return f"{row['title']}: FAILED, {why}"
    said = [f"{text} {name}" for name, text in _measured(row) if text]
    times = [f"{n} {_peer(row, n)}" for n, entry in row["peers"].items() if "times_ours" in entry]
    said += [f"time of {', '.join(times)}"] if times else []
    said += [f"MISSED: {row.get('target')}"] if row.get("holds") is False else []
    return f"{row['title']}:{'' if row['right'] else ' WRONG;'} {'; '.join(said)}"


def _measured(row: Row) -> Iterator[tuple[str, str]]:
    """Our measurements by name; an empty text for each that is missing."""
    ours = entry_of(row, OURS)
    time = duration(ours["median_us"]) if "median_us" in ours else ""
    yield OURS, "FAILED" if failed(row) else time
    for key, unit in RATES.items():
        yield unit, digits(ours[key]) if key in ours else ""  # type: ignore[literal-required]
    yield "step", duration(ours["decode_step_us"]["median"]) if "decode_step_us" in ours else ""
    yield "MFU", f"{ours['mfu']:.1%}" if "mfu" in ours else ""
    yield f"of {row.get('bound')}", f"{ours['share']:.0%}" if "share" in ours else ""
    yield "peak", memory(ours["peak_bytes"]) if "peak_bytes" in ours else ""
    yield "saved", memory(ours["saved_bytes"]) if "saved_bytes" in ours else ""


def _peer(row: Row, name: str, whole: bool = False) -> str:
    """A peer's time, or else its memory, as a multiple of ours; `whole`: both, with the spread."""
    entry, ours = entry_of(row, name), entry_of(row, OURS)
    said = [f"{-entry['above_us']['median']:+.1f} us"] if "above_us" in entry else []
    if "times_ours" in entry and (whole or not said):
        said.insert(0, (spread if whole else brief)(entry["times_ours"]))
    if whole and "decode_step_us" in entry:
        said.append(f"step {duration(entry['decode_step_us']['median'])}")
    if "peak_bytes" in entry and ours.get("peak_bytes") and (whole or not said):
        said.append(ratio(entry["peak_bytes"] / ours["peak_bytes"]) + " peak" * whole)
    if whole and "saved_bytes" in entry:
        said.append(f"{memory(entry['saved_bytes'])} saved")
    return (", ".join(said) or "-") + (" wrong" if entry.get("right") is False else "")


def columns(
    rows: Sequence[Row], names: Sequence[str], whole: bool = False
) -> tuple[list[list[str]], list[list[str]]]:
    """What there is of ours, and the peers of `names` that took part; each begins with its name."""
    units = dict.fromkeys(unit for row in rows for unit, text in _measured(row) if text)
    ours = [[unit, *(dict(_measured(row)).get(unit, "") for row in rows)] for unit in units]
    there = [name for name in names if not absent(rows, name)]
    return ours, [[name, *(_peer(row, name, whole) for row in rows)] for name in there]


# --- all rows -------------------------------------------------------------------------------------


def summary(results: Results) -> str:
    """The table at the end of a run, and what it comes to."""
    rows = results["rows"]
    measured = [row for row in rows if "error" not in row]
    lines = list(_tables(measured)) if measured else []
    lines += faults(rows)
    lines += [f"left out: {skipped['title']}: {skipped['why']}" for skipped in results["skipped"]]
    lines += standings(measured)
    return "\n".join(part for line in lines for part in _wrapped(line))


def faults(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row that failed, is wrong or missed its target."""
    for row in rows:
        if (why := row.get("error") or entry_of(row, OURS).get("error")) is not None:
            yield f"FAILED: {row['title']}: {why}"
        elif not row["right"]:
            yield f"WRONG: {row['title']}"
        elif row.get("holds") is False:
            yield f"MISSED: {row['title']}: {row.get('target')}"


def _wrapped(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False)


def _shapes(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """The facts that all rows share, and those that tell each one apart."""
    varying, same = split_axes(rows)
    names = ("op", "direction", "dtype")
    constant = [n for n in names if len({row[n] for row in rows}) == 1]  # type: ignore[literal-required]
    told = [str(rows[0][n]) for n in constant]  # type: ignore[literal-required]
    shapes = []
    for row in rows:
        words = [row[n] for n in names if n not in constant]  # type: ignore[literal-required]
        axes = axes_text({n: row["axes"][n] for n in varying if n in row["axes"]})
        shapes.append(" ".join(filter(None, [*words, axes])) or "-")
    return " ".join([*told, axes_text(same)]).strip() or "all rows", shapes


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """What, shape, ours and a column a peer; peers that do not fit have a table after it."""
    about, shapes = _shapes(rows)
    measure = "time" if any("median_us" in entry_of(row, OURS) for row in rows) else "memory"
    yield f"{about}; a peer's {measure} over ours:"
    ours, peers = columns(rows, competitors(rows))
    first = True
    while first or peers:
        shown = ours if first else []
        room = WIDTH - LEAST_SHAPE - sum(map(_width, shown))
        count = 0
        while count < len(peers) and (room := room - _width(peers[count])) >= 0:
            count += 1
        count = max(count, 0 if first else 1)
        shown, peers, first = [*shown, *peers[:count]], peers[count:], False
        yield from _table(shapes, shown)


def _width(column: Sequence[str]) -> int:
    """Of a column and the two spaces before it; its name takes as many lines as it has words."""
    return 2 + max(len(text) for text in [*column[0].split(), *column[1:]])


def _table(shapes: Sequence[str], columns: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [_width(column) for column in columns]
    room = min(max(map(len, shapes)), WIDTH - sum(widths))
    heads = [column[0].split() for column in columns]
    height = max((len(words) for words in heads), default=0)
    for n in range(height):
        words = [(height * [""] + words)[n - height] for words in heads]
        line = "".join(word.rjust(width) for word, width in zip(words, widths))
        yield (" " * room + line).rstrip()
    yield "-" * (room + sum(widths))
    for number, text in enumerate(shapes, 1):
        first, *more = textwrap.wrap(text, room) or [""]
        values = (column[number].rjust(width) for column, width in zip(columns, widths))
        yield (first.ljust(room) + "".join(values)).rstrip()
        yield from (f"  {line}" for line in more)


def standings(rows: Sequence[Row]) -> list[str]:
    """Against each peer, where it is right: wins, ties, losses; what the rows say; targets."""
    lines: list[str] = []
    if found := against(rows):
        shapes = dict(zip([row["title"] for row in rows], _shapes(rows)[1]))
        totals = [
            (of.peer, of.counts, ratio(of.mean), f"{ratio(of.least)} {shapes[of.worst['title']]}")
            for of in found
        ]
        headers = ("against", "faster / tie / slower", "mean", "worst")
        lines += ["", *table(headers, totals).splitlines(), ""]
    return lines + remarks(rows)


def remarks(rows: Sequence[Row]) -> list[str]:
    """Who is not installed; the other reasons and notes, with the number of their rows; targets."""
    texts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for name in (OURS, *peers_of([row])):
            entry = entry_of(row, name)
            if (text := entry.get("refused", entry.get("note"))) is not None:
                texts[name, text] += 1
    missing = dict.fromkeys(name for name, why in texts if why.endswith(NOT_INSTALLED))
    lines = [f"not installed: {', '.join(missing)}"] if missing else []
    lines += [
        f"{name}, {count} of {len(rows)} rows: {why}"
        for (name, why), count in texts.items()
        if name not in missing
    ]
    targets = [row for row in rows if "target" in row]
    for target in dict.fromkeys(row["target"] for row in targets):
        held = [row.get("holds") is True for row in targets if row["target"] == target]
        lines.append(f"{sum(held)} of {len(held)} rows hold their target: {target}")
    return lines


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    rule = "-" * min(WIDTH, max(map(len, lines)))
    return "\n".join([lines[0], rule, *lines[1:]])


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
