"""Plots over the sequence length: speed, share of the ceiling, memory, of a group of rows each.

A panel is a sweep: rows that differ in `seqlen` alone, or in `seqlen` and `batch` with their
product constant. What is drawn is planned without matplotlib, so that a report can be checked.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from report_files import Run
from report_rows import OURS, RATES, Group, axes_text, ceilings_of, entry_of, groups, peers_of
from schema import Row

LEAST_LENGTHS = 3
# Okabe and Ito's colours but yellow, which is pale on white, then some of Tol's; black is ours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255")
MARKERS = "sD^vP<>"
CEILING = "#7F7F7F"


@dataclass(frozen=True)
class Quantity:
    """What stands on the y axis: `field` of an entry, over `unit`."""

    name: str
    field: str
    label: str
    unit: float = 1.0
    log: bool = False


SPEEDS = (
    *(Quantity("speed", field, label) for field, label in RATES.items()),
    Quantity("speed", "median_us", "us", log=True),
)
OTHERS = (
    Quantity("share of the ceiling", "share", "% of the ceiling", 0.01),
    Quantity("peak memory", "peak_bytes", "MiB above the inputs", 2**20, log=True),
)


@dataclass(frozen=True)
class Panel:
    """A sweep, by seqlen, and what tells it from its neighbours."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Plot:
    """One PNG."""

    run: Run
    group: Group
    quantity: Quantity
    title: str
    file: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Style:
    """How a peer is drawn, the same in every plot."""

    colour: str
    marker: str
    line: str = "-"
    label: str = ""


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as failure:
        return f"matplotlib is not installed ({failure})"
    return None


# --- what to draw -------------------------------------------------------------------------------


def plan(runs: Iterable[Run]) -> list[Plot]:
    """The plots of all groups that have a sweep."""
    found: list[Plot] = []
    taken: Counter[str] = Counter()
    for run in runs:
        for group, rows in groups(run.data["rows"]).items():
            same, panels = _panels(rows)
            for quantity in _quantities(chain.from_iterable(panel.rows for panel in panels)):
                names = (run.device, run.data["subject"], run.data["preset"], *group, quantity.name)
                stem = re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower()).strip("-")
                taken[stem] += 1
                file = f"{stem}-{taken[stem]}.png" if taken[stem] > 1 else f"{stem}.png"
                op, direction, dtype = group
                title = f"{op} {direction}, {dtype}, {run.device}: {quantity.name}"
                title = ", ".join([title, same] if same else [title])
                found.append(Plot(run, group, quantity, title, file, panels))
    return found


def _panels(rows: Sequence[Row]) -> tuple[str, list[Panel]]:
    """What all sweeps have in common, and the sweeps."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row["axes"].get("seqlen"), int):
            others = {n: v for n, v in row["axes"].items() if n not in ("seqlen", "batch")}
            alike.setdefault(axes_text(others), []).append(row)
    sweeps = list(chain.from_iterable(map(_sweeps, alike.values())))
    facts = [list(facts) for facts, _ in sweeps]
    same = [fact for fact in facts[0] if all(fact in of for of in facts)] if facts else []
    panels = [
        Panel(" ".join(fact for fact in of if fact not in same), sweep)
        for of, (_, sweep) in zip(facts, sweeps)
    ]
    return " ".join(same), panels


def _sweeps(rows: Sequence[Row]) -> list[tuple[list[str], list[Row]]]:
    """Of rows that differ in seqlen and batch: those of one batch or of as many tokens."""
    return max((_grouped(rows, fact) for fact in (_batch, _tokens)), key=_longest)


def _grouped(
    rows: Sequence[Row], constant: Callable[[Row], str]
) -> list[tuple[list[str], list[Row]]]:
    """What holds of all of a sweep, and its rows."""
    kept: dict[str, list[Row]] = {}
    for row in rows:
        kept.setdefault(constant(row), []).append(row)
    return [
        ([*_facts(of[0]), *([fact] if fact else [])], sorted(of, key=_seqlen))
        for fact, of in kept.items()
        if len(set(map(_seqlen, of))) >= LEAST_LENGTHS
    ]


def _longest(sweeps: Sequence[tuple[list[str], list[Row]]]) -> int:
    return max((len(set(map(_seqlen, rows))) for _, rows in sweeps), default=0)


def _facts(row: Row) -> list[str]:
    return [axes_text({n: v}) for n, v in row["axes"].items() if n not in ("seqlen", "batch")]


def _batch(row: Row) -> str:
    return f"batch={row['axes']['batch']}" if "batch" in row["axes"] else ""


def _tokens(row: Row) -> str:
    return f"batch*seqlen={row['axes'].get('batch', 1) * _seqlen(row)}"


def _seqlen(row: Row) -> int:
    return row["axes"]["seqlen"]


def _quantities(rows: Iterable[Row]) -> list[Quantity]:
    """The first speed that ours has, and whatever else was measured of anyone."""
    rows = list(rows)
    speed = [q for q in SPEEDS if any(q.field in entry_of(row, OURS) for row in rows)][:1]
    entries = [entry for row in rows for entry in row.get("peers", {}).values()]
    return speed + [q for q in OTHERS if any(q.field in entry for entry in entries)]


def styles(runs: Iterable[Run]) -> dict[str, Style]:
    """Of every peer in any of the files."""
    rows = [row for run in runs for row in run.data["rows"]]
    ceilings = ceilings_of(rows)
    of = {OURS: Style("#000000", "o", label="fastattn")}
    for number, name in enumerate(sorted(set(peers_of(rows)) - ceilings)):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        of[name] = Style(colour, marker, label=name)
    for name in sorted(ceilings):
        of[name] = Style(CEILING, ".", "--", f"{name} (ceiling)")
    return of


# --- drawing ------------------------------------------------------------------------------------


def draw(plot: Plot, of: Mapping[str, Style], path: Path) -> None:
    """Write the PNG: the same bytes for the same data and matplotlib."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(plot.panels) in (2, 4) else min(3, len(plot.panels))
    lines = math.ceil(len(plot.panels) / columns)
    with matplotlib.style.context("default"):
        size = (max(6.5, 4.2 * columns), 1.2 + 3.0 * lines)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten().tolist()
        for axes in grid[len(plot.panels) :]:
            axes.remove()
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid, plot.panels):
            for name, style in of.items():
                handles |= _draw_peer(axes, panel, plot.quantity, name, style)
            _draw_axes(axes, panel, plot.quantity)
        for axes in grid[: len(plot.panels) : columns]:
            axes.set_ylabel(plot.quantity.label)
        figure.suptitle(plot.title, fontsize="medium", wrap=True)
        across = min(4, len(handles))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=across)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _draw_axes(axes: Any, panel: Panel, quantity: Quantity) -> None:
    lengths = sorted(set(map(_seqlen, panel.rows)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("seqlen")
    if quantity.log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize="small")
    axes.grid(alpha=0.3)


def _draw_peer(
    axes: Any, panel: Panel, quantity: Quantity, name: str, style: Style
) -> dict[str, Any]:
    """Returns what the legend shows of it, by label."""
    points = [p for row in panel.rows if (p := _point(row, name, quantity)) is not None]
    if not points:
        return {}
    x, y, low, high = zip(*points)
    look: dict[str, Any] = {"linewidth": 2.0, "zorder": 3} if name == OURS else {"linewidth": 1.2}
    look |= {"color": style.colour, "marker": style.marker, "linestyle": style.line}
    handles = {style.label: axes.plot(x, y, **look)[0]}
    axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
    wrong = {_seqlen(row) for row in panel.rows if entry_of(row, name).get("right") is False}
    spots = [(at, value) for at, value in zip(x, y) if at in wrong]
    if spots:
        crosses = axes.plot(*zip(*spots), "x", color=style.colour, markersize=12, zorder=4)
        handles[f"{style.label}, wrong"] = crosses[0]
    return handles


def _point(row: Row, name: str, quantity: Quantity) -> tuple[float, float, float, float] | None:
    """seqlen, the value and, of a speed, what it was at the 80th and 20th percentile of time."""
    entry: Mapping[str, Any] = entry_of(row, name)
    if quantity.field not in entry:
        return None
    value = entry[quantity.field] / quantity.unit
    low = high = 1.0
    if quantity in SPEEDS and "median_us" in entry:
        low, high = (entry[f"{p}_us"] / entry["median_us"] for p in ("p20", "p80"))
        if quantity.field != "median_us":
            low, high = 1 / high, 1 / low
    return _seqlen(row), value, value * low, value * high
