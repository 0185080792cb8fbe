"""Results files: which a report is made of, and why others are refused."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from schema import Environment, Results, SchemaError, read


class ReportError(ValueError):
    """No report can be made of it; the message names the file and the place."""


@dataclass(frozen=True)
class Run:
    """A results file."""

    path: Path
    data: Results

    @property
    def environment(self) -> Environment:
        return self.data["environment"]

    @property
    def device(self) -> str:
        return self.environment["device"]

    @property
    def name(self) -> str:
        return f"{self.data['subject']}, preset `{self.data['preset']}`"

    @property
    def commit(self) -> str:
        modified = " (modified checkout)" if self.environment["modified"] else ""
        return f"`{self.environment['commit'][:12]}`{modified}"


def load(places: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """The files, and all *.json below the folders, GPUs first; raises ReportError, SchemaError."""
    paths = {path.resolve(): path for place in places for path in files_of(Path(place))}
    runs = [load_file(path) for path in paths.values()]
    _check_commits(runs)
    return sorted(runs, key=lambda run: (run.data["device"] != "cuda", *_key(run), _when(run)))


def files_of(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield place
        return
    below = sorted(place.rglob("*.json"))
    if not below:
        raise ReportError(f"{place}: no *.json below this folder")
    yield from below


def load_file(path: Path) -> Run:
    try:
        data = read(path)
    except (OSError, UnicodeDecodeError) as failure:
        raise ReportError(f"{path}: {failure}") from failure
    for problem in _problems(data):
        raise SchemaError(f"{path}: {problem}")
    return Run(path, data)


def _problems(data: Results) -> Iterator[str]:
    """Problems that the types do not show."""
    environment = data["environment"]
    for name in ("device", "date", "commit"):
        if not environment[name].strip():
            yield f"results.environment.{name} is empty"
    if not environment["packages"].get("torch"):
        yield "results.environment.packages['torch'] is missing"
    if data["device"] == "cuda" and environment["cuda"] is None:
        yield "results.environment.cuda is missing, and the device is cuda"
    titles: set[str] = set()
    for number, row in enumerate(data["rows"]):
        if row["title"] in titles:
            yield f"results.rows[{number}].title is there twice: {row['title']!r}"
        titles.add(row["title"])


def _check_commits(runs: Sequence[Run]) -> None:
    first: dict[tuple[str, ...], Run] = {}
    for run in runs:
        other = first.setdefault(_key(run), run)
        if other.environment["commit"] != run.environment["commit"]:
            raise ReportError(
                f"{run.path}: results.environment.commit is {run.commit}, but {other.commit} in "
                f"{other.path}, both {run.name} on {run.device}; pass the one that you mean"
            )


def _key(run: Run) -> tuple[str, ...]:
    return run.data["device"], run.device, run.data["subject"], run.data["preset"]


def _when(run: Run) -> tuple[str, str]:
    return run.environment["date"], run.path.name
