"""Shared by all benchmark scripts: options, a process to measure in, a table, a file.

A subject is a grid of cells under names (presets) on each kind of device. Its script measures them
in a process of its own (supervise.py), so that a kernel that hangs or breaks the GPU's context
costs one row; every row is on disk before the next one is begun.

Exit code: 0 all that ran is right and holds its target, 1 something is wrong, broke or missed its
target, 2 it could not begin, 3 nothing is wrong but something was left out for lack of time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout
import schema
import supervise
import torch
from environment import environment, others
from harness import DIRECTIONS, Cell, DeviceLost, reason
from schema import Environment, Peak, Results, Row
from show import Progress, summary

from fastattn.cli.pipe import quietly

PRESETS = ("quick", "full", "paper")
PAUSE = 0.1  # of the time a row took, at most a second, that a GPU rests before the next one
METHOD = {
    "clock": "CUDA events around batches of calls of at least 2 ms; on the CPU timeit",
    "order": "candidates interleaved, every second round backwards, after a warm-up until stable",
    "inputs": "normal random, several sets in rotation, on a GPU together larger than its L2",
    "statistics": "median, 20th and 80th percentile over the rounds; ratios inside a round",
    "errors": "against the definition on the same rounded inputs, beside plain PyTorch's",
    "flops": "attention 4 B H Sq Sk D forward, half of it causal; backward 2.5 times forward",
    "bytes": "each tensor that must be read or written, once",
}


Grid = Mapping[str, Sequence[Any]]  # axis -> values, of which all combinations are taken


def boolean(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text.lower() in ("yes", "true", "1")


@dataclass(frozen=True)
class Axis:
    """An option of a script: its values, and how they are read."""

    help: str
    kind: Callable[[str], Any] = int
    choices: Sequence[Any] | None = None


# Axes that several subjects have.
DTYPE = Axis("of the tensors", kind=str, choices=("bfloat16", "float16", "float32"))
DIRECTION = Axis("what is timed", kind=str, choices=DIRECTIONS)
COMPILE = Axis("have torch.compile take part; seconds to compile a row", kind=boolean)


def grids(**common: Sequence[Any]) -> Callable[..., Grid]:
    """A function from some axes to a grid; the other axes have the `common` values."""

    def grid(**axes: Sequence[Any]) -> Grid:
        return {**axes, **{name: values for name, values in common.items() if name not in axes}}

    return grid


@dataclass(frozen=True)
class Subject:
    """The subject of a script.

    Attributes:
        name: of the script and its results.
        description: the script's docstring.
        axes: options by name; each replaces the values of the presets' grids.
        presets: (device, preset) -> grids, the most telling cells first.
        make: the cell of `device` and one value for each axis; None where it makes no sense.
        seconds: how long a cell is timed, by device.
        peak: the rate that `mfu` is a share of, by device.
        method: where it differs from METHOD.
    """

    name: str
    description: str
    axes: Mapping[str, Axis]
    presets: Mapping[tuple[str, str], Sequence[Grid]]
    make: Callable[..., Cell | None]
    seconds: Mapping[str, float] = field(default_factory=lambda: {"cpu": 1.0, "cuda": 1.5})
    peak: Callable[[str], Peak | None] = lambda device: None
    method: Mapping[str, str] = field(default_factory=dict)

    def cells(
        self, device: str, preset: str, given: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Cell]:
        """The cells of a preset, in order, each once; `given` axes replace the preset's.

        Raises ValueError, naming those there are, for a preset that the subject does not have.
        """
        if (device, preset) not in self.presets:
            known = [name for kind, name in self.presets if kind == device]
            raise ValueError(
                f"{self.name} has no preset {preset!r} on {device}; it has {', '.join(known)}"
            )
        found: dict[str, Cell] = {}
        for grid in self.presets[device, preset]:
            for values in _product({**grid, **(given or {})}):
                cell = self.make(device=device, **values)
                if cell is not None:
                    found.setdefault(cell.title, cell)
        return list(found.values())


def _product(grid: Grid) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values))


# --- the command line -----------------------------------------------------------------------------


def parser_of(subject: Subject) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=subject.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=default, help=f"default: {default}")
    add("--preset", default="quick", metavar="NAME", help=f"{', '.join(PRESETS)}; default: quick")
    add("--peers", nargs="+", metavar="NAME", help="only these, beside ours and the ceiling")
    add("--seconds", type=float, help="to time a row for; default by subject")
    add("--minutes", type=float, help="begin no row after this long")
    add("--threads", type=int, help="of torch on the CPU; default: torch's own")
    add("--json", type=Path, metavar="FILE", help="write the results here, row by row")
    add("--record", action="store_true", help="write them into benchmarks/results")
    add("--resume", action="store_true", help="keep the rows of FILE; measure what it lacks")
    add("--list", action="store_true", help="print the rows to be measured, and end")
    add("--commit", help="the commit measured, where the checkout cannot tell")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--skip", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    axes = parser.add_argument_group("axes: values to take instead of the preset's")
    for name, axis in subject.axes.items():
        axes.add_argument(
            option(name), dest=f"axis_{name}", type=axis.kind, choices=axis.choices, nargs="+",
            metavar=None if axis.choices else "N", help=axis.help,
        )  # fmt: skip
    return parser


def option(axis: str) -> str:
    return f"--{axis.replace('_', '-')}"


def main(subject: Subject, argv: Sequence[str] | None = None) -> int:
    """Run the script of `subject`; returns its exit code."""
    return quietly(lambda: _main(subject, list(sys.argv[1:] if argv is None else argv)))


def _main(subject: Subject, argv: list[str]) -> int:
    parser = parser_of(subject)
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.json is None and not arguments.record:
        parser.error("--resume needs the file to go on with: --json FILE")
    if arguments.record and arguments.json is not None:
        parser.error("--record names the file itself: leave --json out")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu measures small shapes on the CPU")
    given = {
        name: values
        for name in subject.axes
        if (values := getattr(arguments, f"axis_{name}")) is not None
    }
    try:
        cells = subject.cells(arguments.device, arguments.preset, given)
    except ValueError as unknown:
        parser.error(str(unknown))
    if not cells:
        parser.error("no cell is left with these axes")
    if arguments.list:
        print("\n".join(cell.title for cell in cells))
        return 0
    if arguments.worker:
        return work(subject, cells, arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return run(subject, cells, argv, arguments)


def run(
    subject: Subject, cells: Sequence[Cell], argv: list[str], arguments: argparse.Namespace
) -> int:
    """Have the cells measured in another process; write and show the results."""
    start = time.monotonic()
    where = environment(arguments.device, commit=arguments.commit)
    if arguments.record:
        if where["modified"] or not where["commit"]:
            print(f"{subject.name}: --record is for code that is committed", file=sys.stderr)
            return 2
        arguments.json = record_path(subject.name, arguments.preset, where)
    results: Results = {
        "schema": schema.SCHEMA,
        "subject": subject.name,
        "device": arguments.device,
        "preset": arguments.preset,
        "command": [f"benchmarks/{subject.name}.py", *argv],
        "environment": where,
        "method": {**METHOD, **subject.method},
        "rows": [],
        "skipped": [],
        "seconds": 0.0,
    }
    if (peak := subject.peak(arguments.device)) is not None:
        results["peak"] = peak
    if arguments.resume and arguments.json.exists():
        try:
            results["rows"] = kept(schema.read(arguments.json), results)
        except schema.SchemaError as failure:
            print(f"{subject.name}: {failure}", file=sys.stderr)
            return 2
    if arguments.device == "cuda" and (busy := results["environment"]["cuda"]["busy"]):
        print(f"the GPU is busy, so times may be long: {'; '.join(busy)}", file=sys.stderr)

    titles = [cell.title for cell in cells]
    # The worker cuts itself to the grid again, from the same arguments.
    command = [sys.executable, str(checkout.ROOT / "benchmarks" / f"{subject.name}.py"), *argv]
    command += ["--worker", "--device", arguments.device]
    end = None if arguments.minutes is None else start + 60 * arguments.minutes

    def save() -> None:
        results["seconds"] = time.monotonic() - start
        if arguments.json is not None:
            schema.write(arguments.json, results)

    save()
    with Progress(subject.name, len(titles)) as progress:
        for event in supervise.measure(command, titles, done=results["rows"], end=end):
            if isinstance(event, str):
                progress.begin(event)
                continue
            if "why" in event:
                results["skipped"].append(event)
            else:
                results["rows"].append(event)
                progress.row(event)
            save()
    save()
    print(summary(results))
    return exit_code(results)


def record_path(subject: str, preset: str, where: Environment) -> Path:
    """benchmarks/results/<device>/<date>-<commit>-<subject>-<preset>.json"""
    device = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    name = f"{where['date'][:10]}-{where['commit'][:10]}-{subject}-{preset}.json"
    return checkout.ROOT / "benchmarks" / "results" / device / name


def kept(old: Results, new: Results) -> list[Row]:
    """The rows of a file that the same code measured on the same device."""
    for name in ("device", "commit"):
        ours, theirs = new["environment"][name], old["environment"][name]  # type: ignore[literal-required]
        if ours != theirs or old["subject"] != new["subject"]:
            raise schema.SchemaError(
                f"--resume: the file is of {old['subject']}, {name} {theirs!r}, not of "
                f"{new['subject']}, {ours!r}; name another file"
            )
    return [row for row in old["rows"] if "error" not in row]


def exit_code(results: Results) -> int:
    if any(not row["right"] or row.get("holds") is False for row in results["rows"]):
        return 1
    return 3 if results["skipped"] else 0


# --- the measuring process ------------------------------------------------------------------------


def work(subject: Subject, cells: Sequence[Cell], arguments: argparse.Namespace) -> int:
    """Measure the cells and say so in lines of JSON: each cell when it begins, then its row."""
    lines = Lines()
    pin(arguments)
    seconds = subject.seconds[arguments.device] if arguments.seconds is None else arguments.seconds
    for number, cell in enumerate(cells):
        if number in arguments.skip:
            continue
        lines.send(cell=cell.title, limit=cell.limit + 3 * seconds)
        start = time.monotonic()
        try:
            row = cell.measure(seconds, arguments.peers)
            if arguments.device == "cuda" and (busy := others()):
                row["gpu"] = {**row.get("gpu", {}), "busy": "; ".join(busy)}
        except DeviceLost as lost:
            print(f"the GPU's context is lost: {lost}", file=sys.stderr)
            return 1
        except Exception as failure:
            row = supervise.broken(cell.title, reason(failure))
        row["seconds"] = round(time.monotonic() - start, 2)
        lines.send(row=schema.finite(row))
        if arguments.device == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
            time.sleep(min(1.0, PAUSE * row["seconds"]))
    return 0


def pin(arguments: argparse.Namespace) -> None:
    """As many processors as threads, so that none wanders."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[: max(1, torch.get_num_threads())])


class Lines:
    """Events on what was standard output, which from now on is standard error to all others."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, **event: object) -> None:
        self._file.write(json.dumps(event) + "\n")
