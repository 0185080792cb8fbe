"""The table of main loops in docs/kernels.md: from the machine code of ours, beside others'.

    python tests/compile/table.py            # prints it (minutes)
    python tests/compile/table.py --write    # and puts it into docs/kernels.md

Ours are compiled for GPUs that need not be there (offline.py); peers.json has what the same
reading and the same model made of FlashAttention-2's and -3's machine code. test_table.py holds the
tiles in the document against the tables of tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DOCUMENT = ROOT / "docs" / "kernels.md"
MARKERS = ("<!-- main loops -->", "<!-- /main loops -->")
PEERS = Path(__file__).with_name("peers.json")

HEADER = """\
| kernel | tile | registers | spills | blocks an SM | other instructions a clock | bound | estimate |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""
INTRODUCTION = """\
**Estimates, not measurements**, by `python tests/compile/table.py --write`: Triton {triton}, torch
{torch}, bfloat16. Spills are accesses of a thread's stack, all of the kernel's / those of a trip.
*Other instructions* are those beside the products, for each clock that the products take. The bound
is a share of the tensor cores' peak, and the unit that sets it; the estimate is the same trip
simulated, where a range shows two ways in which warpgroups may share a tensor core."""


# --- ours -----------------------------------------------------------------------------------------


def rows(architecture: int) -> list[list[str]]:
    """Of our kernels on one chip."""
    from compile import offline

    jobs = [(architecture, n) for n in range(len(offline.launches_of("table", architecture)))]
    workers = int(os.environ.get("FASTATTN_COMPILE_WORKERS", os.cpu_count() or 1))
    with ProcessPoolExecutor(workers) as pool:
        return [row for row in pool.map(_row, jobs) if row]


def _row(job: tuple[int, int]) -> list[str] | None:
    """None for a kernel without products in a loop."""
    from compile import model, offline, sass

    architecture, index = job
    kernel, args, constants, configuration = offline.launches_of("table", architecture)[index]
    source = offline.source_of(kernel, architecture, args, constants)
    compiled, text = offline.machine_code(architecture, *source)
    code, chip = sass.instructions(text), model.CHIPS[architecture]
    trip = sass.trip(sass.main_loop(code))
    if not any(sass.kind(x.opcode) == "mma" for x in trip):
        return None
    registers, _ = offline.resources(text)
    warps = compiled.metadata.num_warps
    blocks = model.blocks_per_sm(chip, registers, 32 * warps, compiled.metadata.shared)
    bound = model.bound(trip, chip)
    low, high = (f"{100 * x:.0f}" for x in model.estimate(trip, chip, blocks, warps // 4))
    spills = sum(sass.kind(x.opcode) == "local" for x in code)
    return [
        name(kernel.__name__, configuration), _tile(constants), str(registers),
        f"{spills} / {bound.spills}", str(blocks), f"{bound.others_per_clock:.2f}",
        f"{bound.share:.0%} {bound.longest}", (low if low == high else f"{low}-{high}") + " %",
    ]  # fmt: skip


def name(kernel: str, configuration: dict[str, Any]) -> str:
    what = kernel.strip("_").removesuffix("_kernel")
    if "head_dim" not in configuration:
        return f"{'linear_cross_entropy' if 'classes' in configuration else 'ffn'} {what}"
    masking = ", causal" if configuration["features"] == "causal" else ""
    return f"{what} d {configuration['head_dim']}{masking}"


def _tile(constants: dict[str, Any]) -> str:
    sides = [constants[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if x in constants]
    return tile(sides, constants["num_warps"], constants["num_stages"])


def tile(sides: Sequence[int], warps: int, stages: int) -> str:
    """128 x 64, 8 warps, 3 stages."""
    return f"{' x '.join(map(str, sides))}, {warps} warps, {stages} stage{'s' * (stages > 1)}"


# --- the table ------------------------------------------------------------------------------------


def peers(architecture: int) -> list[list[str]]:
    return [
        [
            f"*{x['name']}*", x["tile"], str(x["registers"]), x["spills"], str(x["blocks"]),
            f"{x['others per clock']:.2f}", x["bound"],
            x["estimate"] + (f", published {x['published']}" if "published" in x else ""),
        ]
        for x in json.loads(PEERS.read_text())["peers"]
        if x["architecture"] == architecture
    ]  # fmt: skip


def text() -> str:
    """What stands between the markers."""
    import torch
    import triton
    from compile import model

    versions = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
    parts = [INTRODUCTION.format(**versions)]
    for architecture, chip in model.CHIPS.items():
        lines = [f"| {' | '.join(row)} |" for row in rows(architecture) + peers(architecture)]
        parts.append("\n".join([f"sm_{architecture} ({chip.name}):\n", HEADER, *lines]))
    return "\n\n".join(parts)


def written() -> str:
    """What stands there now."""
    return DOCUMENT.read_text().split(MARKERS[0])[1].split(MARKERS[1])[0].strip()


def tiles_written() -> dict[tuple[int, str], str]:
    """{(architecture, kernel): tile} of ours, as the document has them."""
    found: dict[tuple[int, str], str] = {}
    architecture = 0
    for line in written().splitlines():
        if chip := re.match(r"sm_(\d+) ", line):
            architecture = int(chip[1])
        elif row := re.match(r"\| ((?:forward|keys|queries|ffn|linear\w+) .*?) \| (.*?) \|", line):
            found[architecture, row[1]] = row[2]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also into docs/kernels.md")
    new = text()
    print(new)
    if parser.parse_args().write:
        before, rest = DOCUMENT.read_text().split(MARKERS[0])
        after = rest.split(MARKERS[1])[1]
        DOCUMENT.write_text(f"{before}{MARKERS[0]}\n\n{new}\n\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()
