"""Test and time fastattn on an NVIDIA GPU: one command in two parts, and no network.

    right   gpu_right.py: builds, then tests, four minutes at most; writes gpu_right.json
    fast    gpu_fast.py: times, five minutes at most; writes gpu_fast.json and a file a subject

Each part can be run by itself; the same command again goes on where the last one stopped. With
`--part fast --preset full --minutes 8.5`, which is `make gpu-bench`, hours of rows are measured so.

Exit code, the worse of both parts': 0 all that ran is right and holds its target, 1 something is
wrong, broke or did not build, 2 it could not begin, 3 all that ran is right, but something was left
out for lack of time: run it again, 4 all that ran is right, but a target was missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import gpu_fast
import gpu_right
import script
import torch
from gpu_report import Exit, Report, together

PARTS = ("right", "fast")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="results")
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to rehearse")
    limits = f"{gpu_right.MINUTES} and {gpu_fast.MINUTES}"
    add("--minutes", type=float, help=f"for each part; default: {limits}")
    add("--rooms", nargs="*", metavar="PATH", default=gpu_right.ROOMS, help="right: the suite")
    subjects = list(gpu_fast.SUBJECTS)
    add("--subjects", nargs="*", choices=subjects, default=subjects, help="fast: what to time")
    add("--preset", choices=script.PRESETS, default="quick", help="fast: of the subjects")
    add("--seconds", help="fast: to time a row for; default by subject")
    add("--commit", help="the commit measured, where the checkout cannot tell")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch; --device cpu rehearses without one")
    if "right" in arguments.part and importlib.util.find_spec("pytest") is None:
        parser.error("the part `right` needs pytest, and better pytest-xdist too")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return together([check(part, arguments) for part in PARTS if part in arguments.part])


def check(part: str, arguments: argparse.Namespace) -> Exit:
    """Run one part and write its report."""
    start = time.monotonic()
    minutes = {"right": gpu_right.MINUTES, "fast": gpu_fast.MINUTES}[part]
    if arguments.minutes is not None:
        minutes = arguments.minutes
    device = arguments.device
    report = Report(arguments.out, part, device, minutes, arguments.commit, start)
    if part == "right":
        return report.finish(gpu_right.check(report, device, arguments.rooms))
    options = [] if arguments.commit is None else ["--commit", arguments.commit]
    options += [] if arguments.seconds is None else ["--seconds", arguments.seconds]
    return report.finish(
        gpu_fast.check(report, device, arguments.subjects, arguments.preset, options)
    )


if __name__ == "__main__":
    raise SystemExit(main())
