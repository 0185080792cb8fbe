"""Machine code of the Gluon kernels, by the installed Triton and the newest ptxas that it carries.

    python tests/compile/hopper.py                   # compiles all, prints rows (a minute)
    python tests/compile/hopper.py --only "forward d 128"
    python tests/compile/hopper.py --write           # and puts them into hopper.json, docs/hopper.md

hopper.json has the rows of each Triton that wrote some: run the writer by each of them.
test_gluon.py holds new rows against it. A row is of the loop without a mask of one consumer:
`read` says what it has.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from compile import sass  # noqa: E402

DOCUMENT = ROOT / "docs" / "hopper.md"
MARKERS = ("<!-- machine code -->", "<!-- /machine code -->")
ROWS = Path(__file__).with_suffix(".json")
PEERS = Path(__file__).with_name("peers.json")
ARCHITECTURE = 90

# --- compiling ------------------------------------------------------------------------------------

FORWARD: dict[str, dict[str, Any]] = {
    "forward d 64": {},
    "forward d 64, causal": {"causal": True},
    "forward d 64, key lengths": {"causal": True},
    "forward d 96": {},
    "forward d 128": {},
    "forward d 128, causal": {"causal": True},
    "forward d 128, window": {"causal": True, "window": (256, 0)},
    "forward d 128, softcap": {"causal": True, "softcap": 30.0},
    "forward d 128, everything": {"window": (256, 64), "softcap": 30.0},  # and ALiBi, a sink
    "forward d 128, key lengths": {"causal": True},
    "forward d 128, packed": {"causal": True},
    "forward d 256": {},
    "forward d 256, causal": {"causal": True},
    "forward d 64, half": {},  # float16
    "forward d 128, half": {"causal": True},
    "forward d 128 and 64": {},  # v is narrower
    "forward d 192 and 128": {},
}
BACKWARD: dict[str, dict[str, Any]] = {
    "backward d 64": {},
    "backward d 64, causal": {"causal": True},
    "backward d 128": {},
    "backward d 128, causal": {"causal": True},
    "backward d 128, window": {"causal": True, "window": (256, 0)},
    "backward d 128, softcap": {"causal": True, "softcap": 30.0},
    "backward d 128, everything": {"window": (256, 64), "softcap": 30.0},  # and ALiBi, a sink
    "backward d 128, key lengths": {"causal": True},
    "backward d 128, packed": {"causal": True},
    "backward d 128, any order": {"deterministic": False},
    "backward d 64, half": {},
    "backward d 128, half": {"causal": True},
}
PRODUCTS = (
    "ffn up",
    "ffn up, gated",
    "ffn down",
    "ffn hidden gradient",  # and the activation's derivative
    "ffn hidden gradient, gated",
    "ffn input gradient, gated",
    "ffn weight gradient",
    "loss forward",  # of linear_cross_entropy
    "loss forward, everything",  # all its options
    "loss backward",
    "loss backward, everything",
)
NAMES = [*FORWARD, *BACKWARD, *PRODUCTS]


def _calls_of_products(name: str) -> list[tuple[dict[str, Any], Callable[[], Any]]]:
    """The same of kernels with the main loop of products, weights as torch.nn.Linear has them."""
    import torch

    from fastattn.ops.common.gluon_products import product
    from fastattn.ops.cross_entropy.problem import IGNORED, Options
    from fastattn.ops.ffn.gluon.backward import derivative
    from fastattn.ops.ffn.gluon.forward import first_product
    from fastattn.ops.linear_cross_entropy.gluon.backward import launch_gradient
    from fastattn.ops.linear_cross_entropy.gluon.forward import launch_forward

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    x, hidden = empty(4096, 1024), empty(4096, 4096)
    into, out_of = empty(4096, 1024).t(), empty(1024, 4096).t()
    gated = name.endswith("gated")
    pre = empty(2, 4096, 4096) if gated else hidden
    gate = into if gated else None
    wide, narrow = empty(4096), empty(1024)
    row = wide.float()
    options = Options(IGNORED, 0.0, 0.0, 1.0, 0.0, "none")
    class_weight = all_weight = None
    if name.endswith("everything"):
        options = Options(IGNORED, 0.1, 1e-4, 0.5, 30.0, "none")
        class_weight, all_weight = row, row[0]
    run: dict[str, Callable[[], Any]] = {
        "up": lambda: first_product(
            x, into, wide, gate, None, hidden, pre, "silu" if gated else "gelu_tanh"
        ),
        "down": lambda: product(x, hidden, out_of, narrow),
        "hidden": lambda: derivative(
            x, out_of, pre, True, not gated, "silu" if gated else "gelu_tanh"
        ),
        "input": lambda: product(x, hidden, into.t(), more=(hidden, into.t())),
        "weight": lambda: product(into.t(), hidden.t(), x),
        "forward": lambda: launch_forward(x, into.t(), wide, row.long(), class_weight, options),
        "backward": lambda: launch_gradient(
            hidden,
            row,
            x,
            into.t(),
            wide,
            row.long(),
            class_weight,
            all_weight,
            torch.stack([row, row]),
            options,
        ),
    }
    return [({"name": name}, run[re.split(r"\W", name)[1]])]


def _calls(name: str) -> list[tuple[dict[str, Any], Callable[[], Any]]]:
    """What launches the kernel of a row, on tensors without memory."""
    if name in PRODUCTS:
        return _calls_of_products(name)
    import torch

    from fastattn.ops.attention import gluon
    from fastattn.ops.attention.call import Learnt, results
    from fastattn.ops.attention.problem import check, check_varlen

    half = torch.float16 if name.endswith("half") else torch.bfloat16

    def empty(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    options = dict((FORWARD | BACKWARD)[name])
    if name.endswith("everything"):
        options |= {x: empty(8, dtype=torch.float32) for x in ("alibi_slopes", "sink")}
    width, width_v = (re.findall(r"\d+", name) * 2)[:2]
    q = empty(2, 1024, 8, int(width))
    k, v = empty(2, 1024, 4, int(width)), empty(2, 1024, 4, int(width_v))
    if name.endswith("lengths"):
        options["key_lengths"] = empty(2, dtype=torch.int32)
    if name.endswith("packed"):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        starts = empty(3, dtype=torch.int32)
        settings, extras = check_varlen(q, k, v, starts, starts, 1024, 1024, **options)
    else:
        settings, extras = check(q, k, v, **options)
    if name in FORWARD:
        return [({"name": name}, lambda: gluon.forward(q, k, v, extras, settings))]
    out, lse = results(q, v)
    wanted = Learnt(*(False for _ in Learnt._fields))
    return [
        (
            {"name": name},
            lambda: gluon.backward(out, None, out, lse, wanted, q, k, v, extras, settings),
        )
    ]


def row(name: str) -> dict[str, Any]:
    """Compile the kernel of a row, and read it."""
    from compile import offline

    from fastattn.ops.common import gluon

    launches = offline.record(ARCHITECTURE, iter(_calls(name)))
    # The backward's kernels of rows have no ring.
    found = (x for x in launches if "STAGES" in x[2] or name in PRODUCTS)
    kernel, args, constants, _ = next(found)
    source = offline.source_of(kernel, ARCHITECTURE, args, constants)
    with gluon.newest_assembler():
        compiled, text = offline.machine_code(ARCHITECTURE, *source)
    registers, spills = offline.resources(text)
    consumers = constants.get("CONSUMERS", 3 if name in PRODUCTS else 2)
    code = sass.instructions(text)
    return {
        "tile": _tile(name, constants),
        "consumers": consumers,
        "registers": registers,
        "spilled bytes": spills,
        "shared": compiled.metadata.shared,
        **read(
            code,
            consumers,
            *_copied(name, constants),
            turns=name in FORWARD,
        ),
        **({"cluster": _cluster(code)} if constants.get("num_ctas", 1) > 1 else {}),
        **({"end": _end(code, _copied(name, constants))} if name in PRODUCTS else {}),
    }


def _tile(name: str, constants: dict[str, Any]) -> str:
    """128 x 128: queries by keys of a program, or rows by columns of its products."""
    if name in PRODUCTS:
        from fastattn.ops.common import gluon_products as ffn

        sides = ffn.CONSUMERS.value * ffn.ROWS.value, 2 * ffn.HALF.value
        cluster = ", two programs" if constants["num_ctas"] == 2 else ""
        return f"{sides[0]} x {sides[1]}, {ffn.STAGES.value} stages{cluster}"
    if "BN" in constants:  # the forward
        sides = constants["CONSUMERS"] * constants["BM"], constants["BN"]
    else:
        from fastattn.ops.attention.gluon.backward import KEYS

        sides = constants["BM"], KEYS
    return f"{sides[0]} x {sides[1]}, {constants['STAGES']} stages"


def _copied(name: str, constants: dict[str, Any]) -> tuple[float, float]:
    """Bytes that are copied for a trip of one consumer, where they bound it; those for a cluster."""
    if name not in PRODUCTS:
        return 0.0, 0.0
    from fastattn.ops.common import gluon_products as ffn

    line = 2 * ffn.TERMS.value / ffn.CONSUMERS.value
    left, right = (line * n for n in (ffn.CONSUMERS.value * ffn.ROWS.value, 2 * ffn.HALF.value))
    return left + right, right if constants["num_ctas"] == 2 else 0.0


# --- reading --------------------------------------------------------------------------------------


def read(
    code: sass.Code,
    consumers: int = 2,
    copied: float = 0.0,
    multicast: float = 0.0,
    turns: bool = False,
) -> dict[str, Any]:
    """Of a kernel with so many consumers, which multiply in turn or as they come.

    `copied`: bytes for a trip of one of them; `multicast`: those of them that two blocks share.

    A trip is the loop's without a mask; "loops" are those of all consumers with products, masked or
    not: the most accesses of the stack that one of them has. "groups" are the wgmmas that a trip
    commits: one a product, or ptxas has made one wait for another. "registers of the loop": the
    highest that it names or accumulates into, and one.
    """
    from compile import model

    chip = model.CHIPS[ARCHITECTURE]
    trip = sass.trip(sass.main_loop(code))
    with_products = [x for x in map(sass.trip, sass.loops(code)) if any(map(sass.wgmma, x))]
    bound = model.bound(trip, chip, copied, multicast)
    low, high = model.estimate(trip, chip, blocks=consumers, warps=1, turns=turns)
    return {
        "registers of the loop": max(map(_highest, trip)) + 1,
        "trip": len(trip),
        "stores of spills": max(_count(x, "STL") for x in with_products),
        "loads of spills": max(_count(x, "LDL") for x in with_products),
        "stores of spills of a trip": _count(trip, "STL"),
        "loads of spills of a trip": _count(trip, "LDL"),
        "groups": sum("gsb0" in x.operands for x in trip if sass.wgmma(x)),
        "wgmmas": sum(sass.wgmma(x) is not None for x in trip),
        "overwritten": len(sass.overwritten_operands(code)),
        "overwritten without waits": len(sass.overwritten_operands(code, heed_waits=False)),
        "stores": dict(sorted(_stores(code).items())),
        "bound": f"{bound.share:.0%} {bound.longest}",
        "estimate": f"{100 * low:.0f}-{100 * high:.0f} %",
    }


def _highest(x: sass.Instruction) -> int:
    """The highest vector register that it names, or accumulates into."""
    names = [int(n) for n in re.findall(r"\bR(\d+)", x.operands)]
    if w := sass.wgmma(x):
        names.append(names[0] + w.n // 2 - 1)
    return max(names, default=-1)


def _count(code: sass.Code, opcode: str) -> int:
    return sum(x.opcode.startswith(opcode) for x in code)


def _cluster(code: sass.Code) -> dict[str, int]:
    """Instructions that reach the other program of a cluster."""
    kinds = {
        "multicasts": "UTMALDG.2D.MULTICAST",
        "arrivals": "SYNCS.ARRIVE.TRANS64.RED",  # at a barrier whose program an address names
        "barriers": "UCGABAR_WAIT",
    }
    return {name: _count(code, opcode) for name, opcode in kinds.items()}


def _end(code: sass.Code, copied: tuple[float, float]) -> dict[str, Any]:
    """Of a tile: what a consumer's loop over tiles has beside a trip; what it costs, by the model.

    The end takes as many clocks as it has instructions, at least: one a clock, of a warp that has
    its quarter of the multiprocessor for itself.
    """
    from compile import model

    trip = sass.trip(sass.main_loop(code))
    loops = (len(x) for x in sass.loops(code) if any(map(sass.wgmma, x)))
    end = min(n for n in loops if n > 1.5 * len(trip)) - len(trip)
    bound = model.bound(trip, model.CHIPS[ARCHITECTURE], *copied)
    copy = model.CONSUMERS * bound.busy["L2"]
    product = max(x for unit, x in bound.busy.items() if unit != "L2")
    shares = (model.with_ends(n, product, copy, end, bound.ideal) for n in (16, 64))
    return {"instructions": end, "shares": [f"{x:.0%}" for x in shares]}


def _stores(code: sass.Code) -> dict[str, int]:
    """Stores to global memory by width: bytes of a thread, or "TMA"."""
    found: dict[str, int] = {}
    for x in code:
        if x.opcode.startswith(("UTMASTG", "UTMAREDG")):
            width = "TMA"
        elif x.opcode.startswith("STG"):
            bits = re.search(r"\.[US]?(8|16|64|128)\b", x.opcode)
            width = str(int(bits[1]) // 8 if bits else 4)
        else:
            continue
        found[width] = found.get(width, 0) + 1
    return found


# --- rows under version control -------------------------------------------------------------------


def report(*names: str) -> dict[str, dict[str, Any]]:
    """{row: what `row` reads}, compiled in a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *(x for name in names for x in ("--only", name))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["rows"]


@functools.cache
def written() -> dict[str, Any]:
    """{Triton's version: {"ptxas": version, "rows": {name: row}}}."""
    return json.loads(ROWS.read_text())


def table(rows: dict[str, Any]) -> str:
    """What stands between the markers."""
    parts = []
    for version, by in rows.items():
        lines = [
            f"Triton {version}, ptxas {by['ptxas']}, bfloat16 (half: float16):\n",
            "| kernel | tile | registers | instructions a trip | spills, stores / loads a trip "
            "| bound | estimate |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, x in by["rows"].items():
            spills = f"{x['stores of spills of a trip']} / {x['loads of spills of a trip']}"
            lines.append(
                f"| {name} | {x['tile']} | {x['registers of the loop']} | {x['trip']} | {spills} "
                f"| {x['bound']} | {x['estimate']} |"
            )
        lines += [
            "\n| kernel | instructions of a tile's end | share of 1024 terms | of 4096 terms |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, x in by["rows"].items():
            if end := x.get("end"):
                lines.append(f"| {name} | {end['instructions']} | {' | '.join(end['shares'])} |")
        parts.append("\n".join(lines))
    peers = json.loads(PEERS.read_text())["peers"]
    lines = [
        "FlashAttention-3, read and estimated by the same programs:\n",
        "| kernel | tile | bound | estimate | measured by others |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for x in peers:
        if x["architecture"] == ARCHITECTURE and x["name"].startswith("FlashAttention-3"):
            name = x["name"].removeprefix("FlashAttention-3 ")
            published = x.get("published", "-")
            lines.append(f"| {name} | {x['tile']} | {x['bound']} | {x['estimate']} | {published} |")
    return "\n\n".join([*parts, "\n".join(lines)])


def in_document() -> str:
    return DOCUMENT.read_text().split(MARKERS[0])[1].split(MARKERS[1])[0].strip()


def main() -> None:
    import triton

    from fastattn.ops.common import gluon

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=NAMES, help="this row; may be repeated")
    parser.add_argument("--write", action="store_true", help="into hopper.json and docs/hopper.md")
    options = parser.parse_args()
    ptxas = ".".join(map(str, gluon.assembler().version))
    new: dict[str, Any] = {}
    for name in options.only or NAMES:
        new[name] = row(name)
        if options.write:
            _write(triton.__version__, ptxas, new)
    print(json.dumps({"triton": triton.__version__, "ptxas": ptxas, "rows": new}, indent=1))


def _write(version: str, ptxas: str, new: dict[str, Any]) -> None:
    """The new rows of a Triton, beside its others."""
    every = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    old = every.get(version, {}).get("rows", {})
    merged = {name: x for name in NAMES if (x := new.get(name, old.get(name)))}
    every = dict(sorted((every | {version: {"ptxas": ptxas, "rows": merged}}).items()))
    ROWS.write_text(json.dumps(every, indent=1) + "\n")
    before, rest = DOCUMENT.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKERS[0]}\n\n{table(every)}\n\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()
