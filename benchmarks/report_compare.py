"""Two runs of one subject on one device, before and after a change: is any row of ours slower?

Rows are matched by title. Where both have a ceiling that was timed in the same rounds, our
time over the ceiling's is compared, so that drift of the machine is divided out; else our time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from facts import OURS, digits, duration, entry_of, failed
from report_files import ReportError, Run, files_of, load_file
from schema import Row, Spread
from show import table

FACTOR = 1.05  # a median that moved by less is no regression, however little noise there is
REGRESSION, IMPROVEMENT, NOISE = "REGRESSION", "improvement", "within the noise"


@dataclass(frozen=True)
class Change:
    """Of one row. Where both sides were timed, `verdict` is one of the three words above."""

    title: str
    before: str
    after: str
    ratio: str
    verdict: str


def compare(before: Path, after: Path) -> int:
    """Print what changed between two files or folders; 1 if any row is a regression, else 0."""
    pairs, unpaired = _pairs(before, after)
    verdicts: list[str] = []
    for a, b in pairs:
        print(f"{a.name}, {a.device}: {_when(a)} -> {_when(b)}")
        for line in _differences(a, b):
            print(line)
        changes = list(changes_of(a, b))
        verdicts += [change.verdict for change in changes]
        lines = [(x.title, x.before, x.after, x.ratio, x.verdict) for x in changes]
        print("\n" + table(("row", "A", "B", "B/A", "verdict"), lines) + "\n")
        for line in (*_only(a, b, "A", "B"), *_only(b, a, "B", "A")):
            print(line)
    for line in unpaired:
        print(line)
    counts = [
        f"{sum(verdict.startswith(kind) for verdict in verdicts)} {kind}"
        for kind in (REGRESSION, IMPROVEMENT, NOISE)
    ]
    print(", ".join([f"{len(verdicts)} rows in both", *counts]))
    return int(any(verdict.startswith(REGRESSION) for verdict in verdicts))


def changes_of(a: Run, b: Run) -> Iterator[Change]:
    rows = {row["title"]: row for row in b.data["rows"]}
    for row in a.data["rows"]:
        if row["title"] in rows:
            yield change_of(row, rows[row["title"]])


def change_of(a: Row, b: Row) -> Change:
    title = a["title"]
    if not (a["right"] and b["right"]):
        verdict = "right now" if b["right"] else "right in neither"
        verdict = f"{REGRESSION}: right before" if a["right"] else verdict
        return Change(title, _state(a), _state(b), "", verdict)
    spreads = _spreads(a, b)
    if spreads is None:
        return Change(title, _state(a), _state(b), "", "not timed in both")
    before, after, text = spreads
    factor = after["median"] / before["median"]
    verdict = NOISE
    if after["p20"] > before["p80"] and factor > FACTOR:
        verdict = REGRESSION
    elif after["p80"] < before["p20"] and factor < 1 / FACTOR:
        verdict = IMPROVEMENT
    return Change(title, text(before["median"]), text(after["median"]), f"{factor:.3f}", verdict)


def _state(row: Row) -> str:
    if failed(row):
        return "failed"
    return "right" if row["right"] else "wrong"


def _spreads(a: Row, b: Row) -> tuple[Spread, Spread, Callable[[float], str]] | None:
    """The values to compare, and how they are written; None if one side was not timed."""
    bound = a.get("bound")
    if bound is not None and bound == b.get("bound"):
        before, after = _over(a, bound), _over(b, bound)
        if before and after:
            return before, after, lambda value: f"{digits(value)} of {bound}"
    before, after = _times(a), _times(b)
    return (before, after, duration) if before and after else None


def _over(row: Row, bound: str) -> Spread | None:
    """Our time over the ceiling's, of which the file has the inverse."""
    inverse = entry_of(row, bound).get("times_ours")
    if inverse is None:
        return None
    return {
        "median": 1 / inverse["median"],
        "p20": 1 / inverse["p80"],
        "p80": 1 / inverse["p20"],
    }


def _times(row: Row) -> Spread | None:
    """Ours, in microseconds."""
    ours = entry_of(row, OURS)
    if "median_us" not in ours:
        return None
    return {"median": ours["median_us"], "p20": ours["p20_us"], "p80": ours["p80_us"]}


# --- which files, and what else differs -----------------------------------------------------------


def _pairs(before: Path, after: Path) -> tuple[list[tuple[Run, Run]], list[str]]:
    """The runs to compare, and a line for each file of a folder that has no counterpart."""
    if before.is_dir() != after.is_dir():
        raise ReportError(f"{before} and {after}: name two files or two folders")
    if not before.is_dir():
        return [_pair(before, after)], []
    a, b = ({file.relative_to(top): file for file in files_of(top)} for top in (before, after))
    pairs = [_pair(a[name], b[name]) for name in sorted(a.keys() & b.keys())]
    if not pairs:
        raise ReportError(f"{before} and {after}: no file of one name in both")
    lines = [f"only in A: {a[name]}" for name in sorted(a.keys() - b.keys())]
    return pairs, lines + [f"only in B: {b[name]}" for name in sorted(b.keys() - a.keys())]


def _pair(before: Path, after: Path) -> tuple[Run, Run]:
    a, b = load_file(before), load_file(after)
    for what, x, y in (
        ("environment.device", a.device, b.device),
        *((name, a.data[name], b.data[name]) for name in ("device", "subject", "preset")),
    ):
        if x != y:
            raise ReportError(f"{before} and {after}: results.{what} is {x!r} and {y!r}")
    return a, b


def _differences(a: Run, b: Run) -> Iterator[str]:
    """Other causes of a difference than the commit."""
    before, after = _setting(a), _setting(b)
    for name in before:
        if before[name] != after[name]:
            yield f"{name} differs: {before[name]} -> {after[name]}"


def _setting(run: Run) -> dict[str, object]:
    environment, cuda = run.environment, run.environment["cuda"] or {}
    driver = (cuda.get("nvidia_smi") or {}).get("driver_version")
    names = ("python", "system", "packages", "processors", "threads", "affinity")
    of_gpu = {name: cuda.get(name) for name in ("toolkit", "cudnn", "sdpa_order", "busy")}
    return {name: environment[name] for name in names} | of_gpu | {"driver": driver}


def _only(a: Run, b: Run, here: str, there: str) -> Iterator[str]:
    """The rows that the other run lacks, with the reason where it says one."""
    others = {row["title"] for row in b.data["rows"]}
    why = {cell["title"]: cell["why"] for cell in b.data["skipped"]}
    for row in a.data["rows"]:
        title = row["title"]
        if title not in others:
            skipped = f" ({there} skipped it: {why[title]})" if title in why else ""
            yield f"only in {here}: {title}{skipped}"


def _when(run: Run) -> str:
    return f"{run.commit} {run.environment['date']}"
