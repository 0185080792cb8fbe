"""From results of never_slower.py to the rows of fastattn/ops/common/slower.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import checkout  # noqa: F401
import schema
from harness import FORWARD, OURS
from schema import Results, Row

from fastattn.ops.common.slower import Key, Slower

RAN_ON = "ran on "  # and the backend: the note of ours
KERNELS = ("cuda", "triton")
NORMS = ("layer_norm", "rms_norm")


def print_table(subject: str, paths: Sequence[Path]) -> int:
    """Print the rows that follow from some files of `subject`; the exit code."""
    try:
        files = [schema.read(path) for path in paths]
        for path, results in zip(paths, files):
            if results["subject"] != subject:
                raise schema.SchemaError(f"{path} is of {results['subject']}, not of {subject}")
    except (OSError, schema.SchemaError) as failure:
        print(f"{subject}: {failure}", file=sys.stderr)
        return 2
    rows = table(files)
    for key in sorted(rows, key=str):
        print(line(key, rows[key]))
    ran = sum(key_of(row, "") is not None for results in files for row in results["rows"])
    print(f"{len(rows)} rows, from {ran} cells that ran on a kernel", file=sys.stderr)
    return 0


def table(files: Iterable[Results]) -> dict[Key, Slower]:
    """What misses the rule goes to torch: all sizes but the longest series of those that hold it.

    The sizes between two that were measured go where the slower one of them goes.
    """
    held: dict[Key, dict[int, bool]] = {}
    dates: dict[Key, str] = {}
    for results in files:
        environment = results["environment"]
        for row in results["rows"]:
            key = key_of(row, environment["device"])
            if key is not None:
                sizes, size = held.setdefault(key, {}), elements(row)
                sizes[size] = row["holds"] and sizes.get(size, True)
                dates[key] = max(environment["date"][:10], dates.get(key, ""))
    found = {}
    for key, sizes in held.items():
        if all(sizes.values()):
            continue
        good = longest([size if sizes[size] else None for size in sorted(sizes)])
        first, last = (good[0], good[-1]) if good else (0, 0)
        below = first if first > min(sizes) else 0
        above = last if last < max(sizes) else None
        found[key] = Slower("torch", dates[key], below, above)
    return found


def key_of(row: Row, device: str) -> Key | None:
    """The row of the table that a measurement belongs to; None if no kernel of ours ran."""
    ours = row.get("peers", {}).get(OURS, {})
    backend = ours.get("note", "").removeprefix(RAN_ON)
    if backend not in KERNELS or "holds" not in row or not row["right"]:
        return None
    needs_grad = None if row["op"] in NORMS else row["direction"] != FORWARD
    return Key(row["op"], backend, row["dtype"], needs_grad, device)


def elements(row: Row) -> int:
    """The size of a row's call, as the op's problem has it."""
    axes = row["axes"]
    if row["op"] != "attention":
        return axes["rows"] * axes["hidden"] * axes.get("inner", 1)
    queries = axes["batch"] * axes.get("seqlen_q", axes["seqlen"])
    return queries * axes["heads"] * axes["head_dim"] * axes["seqlen"]


def longest(values: Iterable[int | None]) -> list[int]:
    """The longest series without None, the last one of equals: large problems count more."""
    series: list[list[int]] = [[]]
    for value in values:
        if value is None:
            series.append([])
        else:
            series[-1].append(value)
    return max(reversed(series), key=len)


def line(key: Key, slower: Slower) -> str:
    """A row as the table has it."""
    limits = f", below={slower.below}" if slower.below else ""
    limits += f", above={slower.above}" if slower.above is not None else ""
    parts = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    return f'    ({parts}): Slower("{slower.than}", "{slower.date}"{limits}),'
