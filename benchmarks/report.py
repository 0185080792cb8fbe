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
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import report_compare
from checkout import ROOT
from facts import (
    Against,
    against,
    axes_text,
    axis_text,
    digits,
    groups,
    peers_of,
    plain,
    ratio,
    split_axes,
    table,
    tally,
)
from report_files import ReportError, Run, load
from schema import Row, SchemaError
from show import columns, faults, remarks

INTRODUCTION = """\
# Performance

Written by `python benchmarks/report.py` from results files. The method: `benchmarks/README.md`."""

LEGEND = """\
A ratio is the time of a peer over ours, taken round by round: above 1 fastattn is faster. In
brackets stand the 20th and the 80th percentile over the rounds; where they enclose 1, or the median
is within 2% of it, it is a tie. "-3.0 us" is the peer's time less ours. All else is a median. "of
copy" is our rate over that of the named ceiling in the same rounds; "peak" is memory above the
inputs, of a peer as a multiple of ours, and "saved" is kept by the forward for the backward. A
wrong result is timed all the same and says "wrong"; means over cells leave it out. "-" is a cell
that a peer cannot do, "FAILED" what should not have failed: the reasons are under the table."""

AGAINST = ("against", "cells", "geometric mean", "faster / tie / slower", "worst cell")
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


def joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {plain(text)}" for text in texts)


def summary_table(runs: Sequence[Run]) -> str:
    """All subjects on all devices against every peer."""
    lines = []
    for run in runs:
        rows = run.data["rows"]
        found = [_against_line(of, of.worst["title"]) for of in against(rows)]
        where = [plain(run.device), run.name, tally(rows)]
        lines += [[*where, *line] for line in found or [["-"] * len(AGAINST)]]
    return table(("device", "subject", "measured", *AGAINST), lines)


def _against_line(of: Against, where: str) -> list[str]:
    worst = f"{ratio(of.least)} {plain(where)}".rstrip()
    return [of.peer, of.cells, ratio(of.mean), of.counts, worst]


def run_section(run: Run, method: Mapping[str, str]) -> str:
    """All of one file; `method` is the part of its method that is not said elsewhere."""
    data = run.data
    words = data["command"]
    if words[:1] and words[0].endswith(".py"):  # a script itself is not executable
        words = ["python", *words]
    counts = f"{tally(data['rows'])}, {len(data['skipped'])} skipped"
    parts = [
        f"### {run.name}",
        f"```bash\n{shlex.join(words)}\n```",
        f"`{run.path.name}`: {counts}, {data['seconds']:.0f} s; commit {run.commit}.",
        bullets(f"{name}: {text}" for name, text in method.items()),
    ]
    if "peak" in data:
        of, flops = plain(data["peak"]["of"]), plain(data["peak"]["flops"])
        parts.append(f"MFU is of {digits(data['peak']['tflops'])} TFLOP/s ({of}); FLOPs: {flops}.")
    for (op, direction, dtype), rows in groups(data["rows"]).items():
        parts += [f"#### {op} {direction}, {dtype}".rstrip(" ,"), group_tables(rows)]
    if data["skipped"]:
        parts += ["Skipped:", bullets(f"{x['title']}: {x['why']}" for x in data["skipped"])]
    return joined(parts)


def group_tables(rows: Sequence[Row]) -> str:
    """Rows of one op, direction and dtype; what they come to against each peer; what they say."""
    varying, same = split_axes(rows)
    axes = [[name, *(plain(axis_text(x["axes"].get(name))) for x in rows)] for name in varying]
    if len(set(zip(*(column[1:] for column in axes)))) < len(rows):
        axes.insert(0, ["cell", *(plain(row["title"]) for row in rows)])
    bounds = {row.get("bound") for row in rows}
    names = [name for name in peers_of(rows) if name not in bounds]
    ours, peers = columns(rows, names, whole=True)
    headers, *cells = zip(*axes, *ours, *peers)
    totals = [
        _against_line(of, axes_text({name: of.worst["axes"].get(name) for name in varying}))
        for of in against(rows)
    ]
    return joined(
        [
            f"All with {plain(axes_text(same))}." if same else "",
            table(headers, cells),
            table(AGAINST, totals) if totals and len(rows) > 1 else "",
            bullets([*faults(rows), *remarks(rows)]),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
