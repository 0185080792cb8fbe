"""Results as Markdown: tables of a group of rows, the section of a run, the summary."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from facts import (
    OURS,
    RATES,
    Against,
    Notes,
    absent,
    against,
    axes_text,
    axis_text,
    ceilings_of,
    competitors,
    digits,
    duration,
    entry_of,
    groups,
    memory,
    peers_of,
    plain,
    ratio,
    split_axes,
    spread,
    table,
    tally,
)
from report_files import Run
from schema import Entry, Row

AGAINST = ("against", "cells", "geometric mean", "faster / tie / slower", "worst cell")

Columns = Sequence[tuple[str, Callable[[Row], str]]]


def joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def filled(columns: Columns, rows: Sequence[Row]) -> str:
    """The table of those columns that say anything."""
    cells = [[text(row) for _, text in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    return table([columns[i][0] for i in kept], [[line[i] for i in kept] for line in cells])


# --- a group of rows ------------------------------------------------------------------------------


def group_tables(rows: Sequence[Row], ceilings: set[str]) -> str:
    """Speed, what several rows come to against each peer, memory, and who took no part."""
    entries = [entry for row in rows for entry in row.get("peers", {}).values()]
    remembered = any("peak_bytes" in entry for entry in entries)
    timed = any("median_us" in entry for entry in entries)
    _, same = split_axes(rows)
    parts = [f"All with {plain(axes_text(same))}." if same else ""]
    if timed or not remembered:
        parts.append(_speed_table(rows, ceilings))
        parts += [_totals_table(rows)] if len(rows) > 1 else []
    if remembered:
        parts += [
            "Memory: the peak above the inputs, of a peer also as a multiple of ours; + what the "
            "forward keeps for the backward.",
            _memory_table(rows),
        ]
    lines = [
        f"- {name} took no part: {'; '.join(dict.fromkeys(_reasons(rows, name)))}"
        for name in peers_of(rows)
        if absent(rows, name)
    ]
    return joined([*parts, "\n".join(lines)])


def _reasons(rows: Iterable[Row], peer: str) -> Iterable[str]:
    return (plain(entry["refused"]) for row in rows if (entry := entry_of(row, peer)))


def _speed_table(rows: Sequence[Row], ceilings: set[str]) -> str:
    notes = Notes()
    bounds = {row["bound"] for row in rows if "bound" in row}
    peers = [
        (f"{name} (ceiling)" if name in ceilings else name, partial(_peer, name=name, notes=notes))
        for name in peers_of(rows)
        if name not in bounds and not absent(rows, name)
    ]
    columns = [
        *_axes_columns(rows),
        ("ours", partial(_ours, notes=notes)),
        *((unit, partial(_rate, name=name)) for name, unit in RATES.items()),
        ("decode step", _decode_step),
        ("MFU", _mfu),
        ("share of ceiling", partial(_share, notes=notes)),
        *peers,
        ("target", _target),
    ]
    return joined([filled(columns, rows), str(notes)])


def _totals_table(rows: Sequence[Row]) -> str:
    varying, _ = split_axes(rows)
    lines = [
        _against_line(of, axes_text({name: of.worst["axes"].get(name) for name in varying}))
        for of in against(rows)
    ]
    return table(AGAINST, lines) if lines else ""


def _memory_table(rows: Sequence[Row]) -> str:
    notes = Notes()
    names = [OURS, *(name for name in peers_of(rows) if not absent(rows, name))]
    columns = [(name, partial(_memory, name=name, notes=notes)) for name in names]
    return joined([filled([*_axes_columns(rows), *columns], rows), str(notes)])


def _against_line(of: Against, where: str) -> list[str]:
    worst = f"{ratio(of.least)} {plain(where)}".rstrip()
    return [of.peer, of.cells, ratio(of.mean), of.counts, worst]


def _axes_columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """The axes that tell the rows apart; the title too where they do not."""
    varying, _ = split_axes(rows)
    columns: list[Any] = [(name, partial(_axis, name=name)) for name in varying]
    apart = {tuple(_axis(row, name) for name in varying) for row in rows}
    return columns if varying and len(apart) == len(rows) else [("cell", _title), *columns]


# --- cells of these tables ------------------------------------------------------------------------


def _title(row: Row) -> str:
    return plain(row["title"])


def _axis(row: Row, name: str) -> str:
    return plain(axis_text(row["axes"].get(name)))


def _ours(row: Row, notes: Notes) -> str:
    entry = entry_of(row, OURS)
    why = row.get("error") or entry.get("error") or entry.get("refused")
    if why is not None:
        return f"failed {notes.mark(why)}"
    return _with_remarks(duration(entry["median_us"]) if "median_us" in entry else "", entry, notes)


def _peer(row: Row, name: str, notes: Notes) -> str:
    entry = entry_of(row, name)
    if "error" in entry or "refused" in entry:
        return _absent(entry, notes)
    parts = [spread(entry["times_ours"])] if "times_ours" in entry else []
    if "above_us" in entry:
        parts.append(f"ours {entry['above_us']['median']:+.1f} us")
    if "decode_step_us" in entry:
        parts.append(f"step {duration(entry['decode_step_us']['median'])}")
    return _with_remarks(", ".join(parts), entry, notes)


def _absent(entry: Entry, notes: Notes) -> str:
    if "error" in entry:
        return f"failed {notes.mark(entry['error'])}"
    return f"- {notes.mark(entry['refused'])}"


def _with_remarks(text: str, entry: Entry, notes: Notes) -> str:
    wrong = ["wrong"] if entry.get("right") is False else []
    noted = [notes.mark(entry["note"])] if "note" in entry else []
    return " ".join([*([text] if text else []), *wrong, *noted])


def _rate(row: Row, name: str) -> str:
    rate = entry_of(row, OURS).get(name)
    return "" if rate is None else digits(rate)


def _decode_step(row: Row) -> str:
    step = entry_of(row, OURS).get("decode_step_us")
    return "" if step is None else duration(step["median"])


def _mfu(row: Row) -> str:
    mfu = entry_of(row, OURS).get("mfu")
    return "" if mfu is None else f"{mfu:.1%}"


def _share(row: Row, notes: Notes) -> str:
    if "bound" not in row:
        return ""
    ceiling, share = entry_of(row, row["bound"]), entry_of(row, OURS).get("share")
    if "error" in ceiling or "refused" in ceiling:
        return f"{row['bound']}: {_absent(ceiling, notes)}"
    return "" if share is None else f"{share:.0%} of {row['bound']}"


def _target(row: Row) -> str:
    if "target" not in row:
        return ""
    return {True: "held", False: "missed", None: "not judged"}[row.get("holds")]


def _memory(row: Row, name: str, notes: Notes) -> str:
    entry, ours = entry_of(row, name), entry_of(row, OURS)
    if "error" in entry or "refused" in entry:
        return "failed " + notes.mark(row["error"]) if "error" in row else _absent(entry, notes)
    parts = []
    if "peak_bytes" in entry:
        parts.append(memory(entry["peak_bytes"]))
        if name != OURS and ours.get("peak_bytes"):
            parts[0] += f" ({ratio(entry['peak_bytes'] / ours['peak_bytes'])})"
    if "saved_bytes" in entry:
        parts.append(f"+ {memory(entry['saved_bytes'])}")
    return _with_remarks(" ".join(parts), entry, notes)


# --- a run ----------------------------------------------------------------------------------------


def run_section(run: Run, method: Mapping[str, str]) -> str:
    """All of one file: command, method, groups, targets, skipped cells.

    Args:
        run: the file.
        method: the part of its method that is not said elsewhere.
    """
    data = run.data
    counts = f"{tally(data['rows'])}, {len(data['skipped'])} skipped"
    parts = [
        f"### {run.name}",
        f"```bash\n{_command(data['command'])}\n```",
        f"`{run.path.name}`: {counts}, {data['seconds']:.0f} s; commit {run.commit}.",
        "\n".join(f"- {name}: {plain(text)}" for name, text in method.items()),
    ]
    if "peak" in data:
        of, flops = plain(data["peak"]["of"]), plain(data["peak"]["flops"])
        parts.append(f"MFU is of {digits(data['peak']['tflops'])} TFLOP/s ({of}); FLOPs: {flops}.")
    ceilings = ceilings_of(data["rows"])
    for group, rows in groups(data["rows"]).items():
        op, direction, dtype = group
        parts += [f"#### {op} {direction}, {dtype}", group_tables(rows, ceilings)]
    parts.append(targets_table(data["rows"]))
    if data["skipped"]:
        lines = [f"- {plain(cell['title'])}: {plain(cell['why'])}" for cell in data["skipped"]]
        parts += ["Skipped:", "\n".join(lines)]
    return joined(parts)


def _command(words: Sequence[str]) -> str:
    """As a shell takes it: a script itself is not executable."""
    return shlex.join(["python", *words] if words[:1] and words[0].endswith(".py") else words)


def targets_table(rows: Sequence[Row]) -> str:
    """Promises, how often each was kept, and the cell that did worst."""
    promised: dict[str, list[Row]] = {}
    for row in rows:
        if "target" in row:
            promised.setdefault(row["target"], []).append(row)
    lines = []
    for target, of in promised.items():
        worst = min(of, key=lambda row: (row.get("holds") is True, _margin(row)[0]))
        facts = [f"{plain(worst['title'])}: {_target(worst)}", _margin(worst)[1]]
        lines.append([plain(target), _held(of), ", ".join(filter(None, facts))])
    return table(("target", "held", "worst cell"), lines) if lines else ""


def _held(rows: Sequence[Row]) -> str:
    return f"{sum(row.get('holds') is True for row in rows)} of {len(rows)}" if rows else ""


def _margin(row: Row) -> tuple[float, str]:
    """How a row did, the less the worse, in the first terms that it has."""
    rivals = {name: entry_of(row, name) for name in competitors([row])}
    for name, entry in rivals.items():
        if "above_us" in entry:
            above = entry["above_us"]["median"]
            return -above, f"ours {above:+.1f} us against {name}"
    ratios = {name: e["times_ours"]["median"] for name, e in rivals.items() if "times_ours" in e}
    if ratios:
        least = min(ratios, key=lambda name: ratios[name])
        return ratios[least], f"{ratio(ratios[least])} against {least}"
    share = entry_of(row, OURS).get("share")
    return (-math.inf, "") if share is None else (share, f"{share:.0%} of {row.get('bound')}")


def summary_table(runs: Sequence[Run]) -> str:
    """All subjects on all devices against every peer."""
    lines = []
    for run in runs:
        rows = run.data["rows"]
        found = [_against_line(of, of.worst["title"]) for of in against(rows)]
        where = [plain(run.device), run.name, tally(rows)]
        lines += [[*where, *line] for line in found or [["-"] * len(AGAINST)]]
    return table(("device", "subject", "measured", *AGAINST), lines)
