"""Measure on this GPU which kernels are faster, and search other tiles of the attention kernels.

First plain calls run on every backend. Dispatch takes the faster one from then on: the rows are
written into the user's cache folder (fastattn/measured.py), for this GPU and these kernels.

Then the rows of the table of tiles that would be better are printed. From the tile of the table the
search walks to the fastest tile that differs by one step in one number, again and again, until none
is faster. It proposes a tile whose gain repeats and is above the noise
(fastattn/ops/attention/tuning.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn import measured
from fastattn.cli import tune_backends
from fastattn.ops.attention import tiles, tuning
from fastattn.ops.common import launch

BACKENDS, TILES = "backends", "tiles"
SHARE = 0.25  # of the budget, for the comparison of backends where both are done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def names(allowed: Sequence[Any], kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
        def split(text: str) -> list[Any]:
            chosen = [kind(name) for name in text.split(",")]
            for name in chosen:
                if name not in allowed:
                    raise argparse.ArgumentTypeError(
                        f"{name!r} is none of {', '.join(map(str, allowed))}"
                    )
            return chosen

        return split

    def option(name: str, allowed: Sequence[Any], kind: Callable[[str], Any] = str) -> None:
        values = ",".join(map(str, allowed))
        parser.add_argument(
            name,
            type=names(allowed, kind),
            default=list(allowed),
            metavar="A,B",
            help=f"some of {values}; default: all",
        )

    parser.add_argument("--only", choices=[BACKENDS, TILES], help="one of the two; default: both")
    parser.add_argument("--op", choices=["attention"], default="attention", help="whose tiles")
    option("--dtype", list(tuning.DTYPES))
    option("--head-dim", tuning.HEAD_DIMS, int)
    option("--kernel", list(tuning.KERNELS))
    option("--masking", tiles.MASKINGS)
    parser.add_argument("--seqlen", type=int, default=4096, help="of the problem; default: 4096")
    parser.add_argument(
        "--budget", type=float, default=1800.0, help="seconds for all of it; default: 1800"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")


def run(arguments: argparse.Namespace) -> int:
    """Tune the rows that were asked for; 2 without a GPU."""
    if not torch.cuda.is_available():
        print(
            "fastattn: tune times kernels on an NVIDIA GPU, and torch can use none here "
            "(fastattn doctor says what there is)",
            file=sys.stderr,
        )
        return 2
    if arguments.seqlen < 1 or not arguments.budget >= 0:
        raise ValueError(
            "seqlen must be at least 1 and budget at least 0; "
            f"got {arguments.seqlen} and {arguments.budget}"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    about = environment(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    report: dict[str, Any] = {"environment": about}
    budget = arguments.budget
    if arguments.only != TILES:
        report["rows"] = _compare(arguments, device, budget * (SHARE if not arguments.only else 1))
        budget *= 1 - SHARE
    if arguments.only != BACKENDS:
        report["entries"] = _search(arguments, device, budget)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(
    arguments: argparse.Namespace, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Compare the backends, and write the user's rows."""
    print("backends, median times of plain calls")
    dtypes = [tuning.DTYPES[name] for name in arguments.dtype]
    rows = tune_backends.compare(device, dtypes, seconds, tune_backends.interleaved)
    for line in tune_backends.described(rows):
        print(f"  {line}")
    if rows:
        path = measured.write(measured.devices(device)[0], rows)
        print(f"written to {path}, where dispatch reads it\n")
    else:
        print("  no kernel could be compared\n")
    return [key._asdict() | row._asdict() for key, row in rows.items()]


def _search(
    arguments: argparse.Namespace, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Search the tiles, and print what would change."""
    entries = tuning.entries_of(
        launch.architecture(device), arguments.kernel, arguments.dtype, arguments.head_dim,
        arguments.masking,
    )  # fmt: skip
    outcomes = []
    for outcome in tuning.tune(entries, device, arguments.seqlen, seconds, tuning.interleaved):
        outcomes.append(outcome)
        for line in tuning.described(outcome):
            print(line, flush=True)
    print()
    for line in tuning.proposals(outcomes):
        print(line)
    return [asdict(outcome) for outcome in outcomes]


def environment(device: torch.device) -> dict[str, str]:
    """The device and versions for which the figures hold."""
    about = {"GPU": torch.cuda.get_device_name(device), "fastattn": fastattn.__version__}
    about |= {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    return about
