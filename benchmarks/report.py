"""The report on results files, which is docs/performance.md.

    python benchmarks/report.py                    # of all files below benchmarks/results
    python benchmarks/report.py FILE FOLDER ...
    python benchmarks/report.py --check            # is the page up to date?
    python benchmarks/report.py --compare A B      # is anything of ours slower in B than in A?

Exit code: 0 done, 1 --check found a difference or --compare a regression, 2 refused: the message
names the file and the place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import report_compare
from checkout import ROOT
from facts import plain, table
from report_files import ReportError, Run, load
from report_tables import joined, run_section, summary_table
from schema import SchemaError

INTRODUCTION = """\
# Performance

Written by `python benchmarks/report.py` from results files. The method: `benchmarks/README.md`."""

LEGEND = """\
A ratio is the time of a peer over ours, taken round by round: above 1 fastattn is faster. In
brackets stand the 20th and the 80th percentile over the rounds; where they enclose 1, or the median
is within 2% of it, it is a tie. "ours +3.0 us" is our time less the peer's. All else is a median.
"share of ceiling" is our rate over that of the named ceiling in the same rounds. A wrong result is
timed all the same and says "wrong"; means over cells leave it out. "-" is a cell that a peer cannot
do, "failed" what should not have failed: the reasons are under the table."""

NO_GPU = "Nothing has been measured on a GPU."


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.compare and (arguments.files or arguments.check):
        parser.error("--compare takes its two files or folders, and nothing else")
    try:
        if arguments.compare:
            return report_compare.compare(*arguments.compare)
        runs = load(arguments.files or [ROOT / "benchmarks" / "results"])
        return report(runs, arguments.page, check=arguments.check)
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
    default = ROOT / "docs" / "performance.md"
    said = f"default: {default.relative_to(ROOT)}"
    parser.add_argument("--page", type=Path, default=default, metavar="PATH", help=said)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page differs")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="files or folders"
    )
    return parser


def report(runs: Sequence[Run], path: Path, check: bool) -> int:
    """Write the page, or with `check` say whether it would change."""
    text = page(runs)
    if path.exists() and path.read_text() == text:
        return 0
    if check:
        print(f"not up to date: {path}")
        return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"written: {path}")
    return 0


def page(runs: Sequence[Run]) -> str:
    """The whole page: the summary, then a section for each device, in it one for each run."""
    shared = _shared_method(runs)
    parts = [INTRODUCTION, _measured(runs), LEGEND, summary_table(runs)]
    if shared:
        parts += ["Of all runs:", "\n".join(f"- {name}: {plain(x)}" for name, x in shared.items())]
    devices: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        devices.setdefault((run.data["device"], run.device), []).append(run)
    for (_, device), of in devices.items():
        parts += [f"## {plain(device)}", _hardware(of), _environments(of)]
        for run in of:
            own = {name: x for name, x in run.data["method"].items() if name not in shared}
            parts.append(run_section(run, own))
    return joined(parts) + "\n"


def _measured(runs: Sequence[Run]) -> str:
    names = [f"{plain(run.device)} ({'GPU' if _on_gpu(run) else 'CPU'})" for run in runs]
    said = f"Measured on: {_distinct(names)}."
    return said if any(map(_on_gpu, runs)) else f"{said} {NO_GPU}"


def _on_gpu(run: Run) -> bool:
    return run.data["device"] == "cuda"


def _shared_method(runs: Sequence[Run]) -> dict[str, str]:
    """The method that all runs have in common, if there are several."""
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
