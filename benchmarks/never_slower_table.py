"""From results of never_slower.py to the rows of fastattn/measured.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import schema
from facts import outcome
from harness import FORWARD, OURS
from schema import Results, Row

from fastattn.measured import Faster, Key, limits

RAN_ON = "ran on "  # and the backend: the note of ours
NEXT = "triton"  # the peer of ours on `cuda`: it would run in place of `cuda`
KERNELS = ("cuda", "triton")
NORMS = ("layer_norm", "rms_norm")


def print_table(
    subject: str, paths: Sequence[Path], make: Callable[[Iterable[Results]], Mapping[Key, Any]]
) -> int:
    """Print the rows that `make` finds in some files of `subject`; the exit code."""
    try:
        files = [schema.read(path) for path in paths]
        for path, results in zip(paths, files):
            if results["subject"] != subject:
                raise schema.SchemaError(f"{path} is of {results['subject']}, not of {subject}")
    except (OSError, schema.SchemaError) as failure:
        print(f"{subject}: {failure}", file=sys.stderr)
        return 2
    rows = make(files)
    for key in sorted(rows, key=str):
        print(line(key, rows[key]))
    ran = sum(key_of(row, "") is not None for results in files for row in results["rows"])
    print(f"{len(rows)} rows, from {ran} cells that ran on a kernel", file=sys.stderr)
    return 0


def table(files: Iterable[Results]) -> dict[Key, Faster]:
    """Sizes that miss the rule go to torch: all sizes but the longest series of those that hold it.

    The sizes between two that were measured go where the slower one of them goes.
    """
    found = {}
    for key, (date, sizes) in judged(files, lambda row: row["holds"]).items():
        if not all(sizes.values()):
            found[key] = Faster("torch", date, *(limits(sizes) or (0, 0)))
    return found


def faster(files: Iterable[Results]) -> dict[Key, Faster]:
    """Where `cuda` is faster than `triton` in the same run: the longest series of such sizes."""

    def is_faster(row: Row) -> bool | None:
        other = row["peers"].get(NEXT, {})
        return outcome(other["times_ours"]) == "faster" if "times_ours" in other else None

    found = {}
    for key, (date, sizes) in judged(files, is_faster).items():
        if key.backend == "cuda" and (between := limits(sizes)) is not None:
            found[key] = Faster(NEXT, date, *between)
    return found


def judged(
    files: Iterable[Results], good: Callable[[Row], bool | None]
) -> dict[Key, tuple[str, dict[int, bool]]]:
    """The last date of a key, and whether all its cells of a size are good; None is no answer."""
    found: dict[Key, tuple[str, dict[int, bool]]] = {}
    for results in files:
        environment = results["environment"]
        for row in results["rows"]:
            key = key_of(row, environment["device"])
            if key is not None and (verdict := good(row)) is not None:
                date, sizes = found.get(key, ("", {}))
                size = elements(row)
                sizes[size] = verdict and sizes.get(size, True)
                found[key] = max(environment["date"][:10], date), sizes
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
    if row["op"] == "linear":
        return axes["rows"] * axes["in_features"] * axes["out_features"]
    if row["op"] != "attention":
        return axes["rows"] * axes["hidden"] * axes.get("inner", 1)
    queries = axes["batch"] * axes.get("seqlen_q", axes["seqlen"])
    return queries * axes["heads"] * axes["head_dim"] * axes["seqlen"]


def line(key: Key, row: Faster) -> str:
    """A row as its table has it."""
    values, defaults = row._asdict(), row._field_defaults
    given = [name for name in defaults if values[name] != defaults[name]]
    limits = "".join(f", {name}={values[name]}" for name in given)
    parts = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    return f'    ({parts}): Faster("{row.than}", "{row.date}"{limits}),'
