"""The report on results files: tables of the README, docs/performance.md and its plots.

    python benchmarks/report.py                    # of all files below benchmarks/results
    python benchmarks/report.py FILE FOLDER ...
    python benchmarks/report.py --check            # is what is written up to date?
    python benchmarks/report.py --compare A B      # is anything of ours slower in B than in A?

In the README what stands between `<!-- benchmarks:begin NAME -->` and
`<!-- benchmarks:end NAME -->` is replaced, and nothing else; NAME is a subject or "summary".

Exit code: 0 done, 1 --check found a difference or --compare a regression, 2 refused: the message
names the file and the place.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import report_compare
import report_plots
from checkout import ROOT
from report_files import ReportError, Run, load
from report_rows import Group, plain, table
from report_tables import joined, run_section, subject_table, summary_table
from schema import SchemaError

SUMMARY = "summary"
MARKER = re.compile(r"<!--\s*benchmarks:(.*?)\s*-->")

INTRODUCTION = """\
# Performance

Written by `python benchmarks/report.py` from results files. The method: `benchmarks/README.md`."""

LEGEND = """\
A ratio is the time of a peer over ours, taken round by round: above 1 fastattn is faster. In
brackets stand the 20th and the 80th percentile over the rounds; where they enclose 1, or the median
is within 2% of it, it is a tie. "ours +3.0 us" is our time less the peer's. All else is a median.
"share of ceiling" is our rate over that of the named ceiling in the same turns. A wrong result is
timed all the same and says "wrong"; means over cells leave it out. "-" is a cell that a peer cannot
do, "failed" what should not have failed: the reasons are under the table."""

RATIOS = "Ratios are a peer's time over ours: above 1 fastattn is faster."
MEANS = f"""\
Of peers: the geometric mean over the cells and, in brackets, the worst cell. {RATIOS}"""
NO_GPU = "Nothing has been measured on a GPU."


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.compare and (arguments.files or arguments.check):
        parser.error("--compare takes its two files or folders, and nothing else")
    try:
        if arguments.compare:
            return report_compare.compare(*arguments.compare)
        return report(
            load(arguments.files or [ROOT / "benchmarks" / "results"]),
            arguments.readme,
            arguments.performance,
            arguments.figures,
            check=arguments.check,
        )
    except (ReportError, SchemaError) as refusal:
        print(f"report.py: {refusal}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="results files, or folders of them"
    )
    docs = ROOT / "docs"
    for option, default in (
        ("--readme", ROOT / "README.md"),
        ("--performance", docs / "performance.md"),
        ("--figures", docs / "figures"),
    ):
        said = f"default {default.relative_to(ROOT)}"
        parser.add_argument(option, type=Path, default=default, metavar="PATH", help=said)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the texts differ")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="files or folders"
    )
    return parser


def report(runs: Sequence[Run], readme: Path, performance: Path, figures: Path, check: bool) -> int:
    """Write README, page and plots, or with `check` say which of the two texts would change."""
    unable = report_plots.missing()
    plots = [] if unable else report_plots.plan(runs)
    if unable:
        print(f"no plots: {unable}")
    folder = _link(figures, performance)

    def images(run: Run, group: Group) -> list[str]:
        of = [plot for plot in plots if plot.run is run and plot.group == group]
        return [f"![{plain(plot.title)}]({folder}/{plot.file})" for plot in of]

    before = _text(readme)
    texts = {
        readme: with_regions(before, regions(runs, _link(performance, readme)), str(readme)),
        performance: page(runs, images, f"No plots were made: {unable}." if unable else ""),
    }
    stale = [path for path, text in texts.items() if not path.exists() or _text(path) != text]
    if check:
        for path in stale:
            print(f"not up to date: {path}")
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(texts[path].encode())
        print(f"written: {path}")
    styles = report_plots.styles(runs)
    for plot in plots:
        report_plots.draw(plot, styles, figures / plot.file)
    if plots:
        print(f"written: {len(plots)} plots in {figures}")
    return 0


def _link(target: Path, page: Path) -> str:
    """As `page` names `target`."""
    return Path(os.path.relpath(target, page.parent)).as_posix()


def _text(path: Path) -> str:
    """With the line ends that it has."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as failure:
        raise ReportError(f"{path}: {failure}") from failure


# --- the README ---------------------------------------------------------------------------------


def regions(runs: Sequence[Run], page: str) -> dict[str, str]:
    """What can stand between markers, by name; `page` has all cells."""
    subjects: dict[str, list[Run]] = {}
    for run in runs:
        subjects.setdefault(run.data["subject"], []).append(run)
    cells = f"All cells: [{page}]({page})."
    tables = {
        name: joined([subject_table(of), f"{MEANS}\n{cells}"]) for name, of in subjects.items()
    }
    return tables | {SUMMARY: joined([_measured(runs), summary_table(runs), f"{RATIOS} {cells}"])}


def with_regions(text: str, tables: dict[str, str], where: str) -> str:
    """`text` with its marked regions replaced, all else as it was."""
    parts: list[str] = []
    opened: str | None = None
    end = 0
    for marker in MARKER.finditer(text):
        place = f"{where}:{text.count(chr(10), 0, marker.start()) + 1}"
        word, _, name = marker[1].partition(" ")
        if word not in ("begin", "end") or name not in tables:
            known = ", ".join(sorted(tables))
            raise ReportError(f"{place}: {marker[0]} must say begin or end, and one of {known}")
        if opened is not None and (word, name) != ("end", opened):
            raise ReportError(f"{place}: {marker[0]}, but benchmarks:begin {opened} is not closed")
        if opened is None and word == "end":
            raise ReportError(f"{place}: {marker[0]} closes nothing")
        if word == "begin":
            opened = name
            parts += [text[end : marker.end()], f"\n\n{tables[name]}\n\n"]
        else:
            opened, end = None, marker.start()
    if opened is not None:
        raise ReportError(f"{where}: benchmarks:begin {opened} is not closed")
    return "".join([*parts, text[end:]])


# --- docs/performance.md ------------------------------------------------------------------------


def page(runs: Sequence[Run], images: Callable[[Run, Group], Sequence[str]], note: str) -> str:
    """The whole page: a section for each device, in it one for each run."""
    shared = _shared_method(runs)
    parts = [INTRODUCTION, _measured(runs), LEGEND, note]
    if shared:
        parts += ["Of all runs:", "\n".join(f"- {name}: {plain(x)}" for name, x in shared.items())]
    devices: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        devices.setdefault((run.data["device"], run.device), []).append(run)
    for (_, device), of in devices.items():
        parts += [f"## {plain(device)}", _hardware(of), _environments(of)]
        for run in of:
            own = {name: x for name, x in run.data["method"].items() if name not in shared}
            parts.append(run_section(run, own, lambda group, run=run: images(run, group)))
    return joined(parts) + "\n"


def _measured(runs: Sequence[Run]) -> str:
    names = [f"{plain(run.device)} ({'GPU' if _on_gpu(run) else 'CPU'})" for run in runs]
    said = f"Measured on: {_distinct(names)}."
    return said if any(map(_on_gpu, runs)) else f"{said} {NO_GPU}"


def _on_gpu(run: Run) -> bool:
    return run.data["device"] == "cuda"


def _shared_method(runs: Sequence[Run]) -> dict[str, str]:
    """What all runs say of their method, if there are several."""
    methods = [run.data["method"] for run in runs]
    if len(methods) < 2:
        return {}
    return {n: x for n, x in methods[0].items() if all(other.get(n) == x for other in methods)}


def _hardware(runs: Sequence[Run]) -> str:
    """One line on the device, several where its runs differ."""
    lines = []
    for run in runs:
        environment = run.environment
        if cuda := environment["cuda"]:
            gib = cuda["memory_bytes"] / 2**30
            what = f"Compute capability {cuda['capability']}, {cuda['multiprocessors']} "
            what += f"multiprocessors, {gib:.0f} GiB, {cuda['l2_bytes'] / 2**20:.0f} MiB of L2"
        else:
            what = f"{environment['processors']} processors"
        lines.append(f"{what}; {environment['system']}.")
    return "\n".join(dict.fromkeys(lines))


def _environments(runs: Sequence[Run]) -> str:
    """A line for each run: when, of what, with which versions."""
    lines = []
    for run in runs:
        environment = run.environment
        packages = [f"{name} {of}" for name, of in environment["packages"].items() if of]
        versions = ", ".join([f"Python {environment['python']}", *packages])
        facts = [run.name, environment["date"], run.commit, versions]
        if cuda := environment["cuda"]:
            driver = (cuda["nvidia_smi"] or {}).get("driver_version", "-")
            order = ", ".join(cuda["sdpa_order"])
            facts += [driver, cuda["toolkit"], str(cuda["cudnn"] or "-"), order]
            facts.append(plain("; ".join(cuda["busy"])) or "nothing")
        else:
            affinity = len(environment["affinity"])
            facts += [f"{environment['threads']} on {affinity} processors"]
            facts.append(f"{environment['load']:.1f}")
        lines.append(facts)
    headers = ["run", "date", "commit", "versions"]
    if runs[0].environment["cuda"]:
        headers += ["driver", "CUDA", "cuDNN", "order of SDPA's backends", "else on the GPU"]
    else:
        headers += ["threads", "load before"]
    return table(headers, lines)


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


if __name__ == "__main__":
    raise SystemExit(main())
