"""Facts of rows: values as text, ties, who took part, ours against a peer.

A ratio is a peer's time over ours, round by round: above 1 we are faster. Rows are grouped by op,
direction and dtype.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schema import Entry, Row, Spread

OURS = "ours"
TIE = 0.02  # medians that differ by less are equal, whatever the spread
RATES = {"tflops": "TFLOP/s", "gbps": "GB/s", "tokens_per_second": "tokens/s"}

Group = tuple[str, str, str]  # op, direction, dtype


def is_tie(times_ours: Spread) -> bool:
    """Whether 1 lies in the spread of the rounds, or the medians are as good as equal."""
    within = times_ours["p20"] <= 1.0 <= times_ours["p80"]
    return within or 1.0 - TIE <= times_ours["median"] <= 1.0 + TIE


def outcome(times_ours: Spread) -> str:
    """Ours is "faster" or "slower" than a peer, or it is a "tie"."""
    if is_tie(times_ours):
        return "tie"
    return "faster" if times_ours["median"] > 1 else "slower"


# --- values ---------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, places)}f}"


def duration(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if abs(us) >= size:
            return f"{digits(us / size)} {unit}"
    return f"{digits(us)} us"


def memory(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{digits(count / size)} {unit}"
    return f"{count} B"


def ratio(value: float) -> str:
    return f"{value:.2f}x" if value >= 0.1 else f"{digits(value)}x"


def brief(values: Spread) -> str:
    return "tie" if is_tie(values) else ratio(values["median"])


def spread(values: Spread) -> str:
    """ "1.32x (1.30-1.34)"; what is not faster says so."""
    said = outcome(values)
    word = "" if said == "faster" else f" {said}"
    return f"{ratio(values['median'])}{word} ({values['p20']:.2f}-{values['p80']:.2f})"


def axis_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return f"({axes_text(value)})"
    return "-" if value is None else str(value)


def axes_text(axes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={axis_text(value)}" for name, value in axes.items())


def plain(text: str) -> str:
    """Somebody's message on one line that Markdown shows as it is."""
    return " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(x.replace('|', chr(92) + '|') for x in y)} |" for y in lines)


# --- rows -----------------------------------------------------------------------------------------


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    grouped: dict[Group, list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["op"], row["direction"], row["dtype"]), []).append(row)
    return grouped


def entry_of(row: Row, peer: str) -> Entry:
    return row.get("peers", {}).get(peer, {})


def peers_of(rows: Iterable[Row]) -> list[str]:
    """Whom ours is compared with, ceilings among them, in the order of the rows."""
    names = dict.fromkeys(name for row in rows for name in row.get("peers", {}))
    return [name for name in names if name != OURS]


def absent(rows: Sequence[Row], peer: str) -> bool:
    """Whether it took no part in any of the rows."""
    entries = [row["peers"][peer] for row in rows if peer in row.get("peers", {})]
    return all("refused" in entry for entry in entries)


def ceilings_of(rows: Iterable[Row]) -> set[str]:
    rows = list(rows)
    bounds = {row["bound"] for row in rows if "bound" in row}
    return bounds | {n for n in peers_of(rows) if any(entry_of(r, n).get("ceiling") for r in rows)}


def competitors(rows: Sequence[Row]) -> list[str]:
    ceilings = ceilings_of(rows)
    return [name for name in peers_of(rows) if name not in ceilings]


def failed(row: Row) -> bool:
    """It could not be measured, or something broke that should not."""
    broken = any("error" in entry for entry in row.get("peers", {}).values())
    return "error" in row or broken or "refused" in entry_of(row, OURS)


def tally(rows: Sequence[Row]) -> str:
    """ "12 cells, 1 failed, 2 wrong"."""
    failures = sum(map(failed, rows))
    wrong = sum(not row["right"] and not failed(row) for row in rows)
    counts = [f"{len(rows)} cell{'s' if len(rows) != 1 else ''}"]
    counts += [f"{failures} failed"] if failures else []
    return ", ".join(counts + ([f"{wrong} wrong"] if wrong else []))


def split_axes(rows: Sequence[Row]) -> tuple[list[str], dict[str, Any]]:
    """The names of the axes that tell the rows apart, and the others with their values."""
    names = dict.fromkeys(name for row in rows for name in row["axes"])
    same = {
        name: rows[0]["axes"][name]
        for name in names
        if len(rows) > 1
        and all(name in row["axes"] and row["axes"][name] == rows[0]["axes"][name] for row in rows)
    }
    return [name for name in names if name not in same], same


@dataclass(frozen=True)
class Against:
    """Ours against one peer over some rows; a row in which either is wrong is left out."""

    peer: str
    cells: str
    mean: float
    outcomes: Counter[str]
    worst: Row

    @classmethod
    def of(cls, rows: Sequence[Row], peer: str) -> Against | None:
        timed = [row for row in rows if "times_ours" in entry_of(row, peer)]
        valid = [r for r in timed if all(entry_of(r, n).get("right", True) for n in (OURS, peer))]
        if not valid:
            return None
        ratios = [_median(row, peer) for row in valid]
        cells = str(len(valid)) + (f" of {len(timed)}" if len(valid) < len(timed) else "")
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        outcomes = Counter(outcome(entry_of(row, peer)["times_ours"]) for row in valid)
        return cls(peer, cells, mean, outcomes, min(valid, key=lambda row: _median(row, peer)))

    @property
    def least(self) -> float:
        return _median(self.worst, self.peer)

    @property
    def counts(self) -> str:
        return " / ".join(str(self.outcomes[said]) for said in ("faster", "tie", "slower"))


def _median(row: Row, peer: str) -> float:
    return entry_of(row, peer)["times_ours"]["median"]


def against(rows: Sequence[Row]) -> list[Against]:
    return [x for peer in competitors(rows) if (x := Against.of(rows, peer)) is not None]
