"""The Gluon kernels' machine code for Hopper: rows under version control, and what none may have.

hopper.py makes the rows; the fix of a row that changed on purpose is `hopper.py --write`.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton
from compile import hopper, model, sass, turns
from compile.test_sass import listing

from fastattn import chips
from fastattn.ops.attention.gluon import tiles
from fastattn.ops.common import gluon_products

# Compiled by every run: the cheapest of each kernel. The others are long.
CHEAP = ("forward d 64", "backward d 64", "ffn down")
# Products of a trip: S and P V; S, dP, dV, dK and dQ; both halves of a tile.
GROUPS = {"forward": 2, "backward": 5, "ffn": 2, "loss": 2}
IN_PARTS = ("forward d 96", "forward d 192 and 128")  # S is two products, of powers of two
# Accesses of the stack in a loop, in the forward loads too, by Triton's version; 0 for all others.
SPILLS = {
    ("3.8.0", "forward d 128, everything"): 1,
    ("3.9.0", "backward d 128, softcap"): 2,
    ("3.9.0", "backward d 128, everything"): 6,
}


def faults(name: str, row: dict[str, Any], version: str = triton.__version__) -> list[str]:
    """What a row has that it may not have, by a Triton of this version."""
    kernel = name.split()[0]
    stores = row["stores"]
    spills = row["stores of spills"]
    groups = GROUPS[kernel] + (name in IN_PARTS)
    # Of a thread: when it is launched, as consumers and four warps for the others; of a consumer.
    launched = 65536 // (128 * (row["consumers"] + 1))
    registers = tiles.REGISTERS[row["consumers"]]
    if kernel == "forward":
        spills += row["loads of spills"]
    if kernel in ("ffn", "loss"):
        registers = gluon_products.REGISTERS.value
        # Not of the end of a tile.
        spills = row["stores of spills of a trip"] + row["loads of spills of a trip"]
    found = {
        "more than the registers of a multiprocessor": row["registers"] > launched,
        "more registers than a consumer has": row["registers of the loop"] > registers,
        "too much shared memory": row["shared"] > chips.shared_memory(90),
        "spills in a loop": spills > SPILLS.get((version, name), 0),
        "wgmmas that wait for each other (ptxas: C7510, C7515)": row["groups"] != groups,
        "the operand of a wgmma under way overwritten": row["overwritten"] > 0,
        "no operand in registers: the check saw nothing": kernel not in ("ffn", "loss")
        and not row["overwritten without waits"],
        "stores of 1 or 2 bytes": "1" in stores or "2" in stores,
        "dK and dV stored by 4 bytes": kernel == "backward" and "4" in stores,
        "tiles stored without TMA": stores.get("TMA", 0) < 2
        and not name.endswith("packed")
        and not name.startswith("loss forward"),
        "a cluster without its copies, arrivals, barriers": not _is_cluster(row),
        "packed rows not stored by 16 bytes": name.endswith("packed") and "16" not in stores,
    }
    return [f"{name}: {fault}: {row}" for fault, there in found.items() if there]


def _is_cluster(row: dict[str, Any]) -> bool:
    """Whether a kernel of two programs copies to both, frees slots of both, begins and ends so."""
    found = row.get("cluster", {})
    if not row["tile"].endswith("two programs"):
        return not found
    arrivals = found["arrivals"] == row["consumers"]  # one in the loop of each
    return bool(found["multicasts"] >= 2 and arrivals and found["barriers"] >= 2)


def check(*names: str) -> None:
    rows = hopper.report(*names)
    assert set(rows) == set(names)
    assert not [x for name, row in rows.items() for x in faults(name, row)]
    before = hopper.written().get(triton.__version__)
    for name, row in rows.items() if before else ():
        assert row == before["rows"][name], f"{name}; if it is meant: hopper.py --write"


def test_the_cheapest_of_each_kernel() -> None:
    check(*CHEAP)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in hopper.NAMES if name not in CHEAP])
def test_every_kernel(name: str) -> None:
    check(name)


def test_the_rows_under_version_control() -> None:
    """Of two Tritons, each of all kernels, none with a fault, and the document's are these."""
    written = hopper.written()
    assert len(written) >= 2
    for version, by in written.items():
        assert list(by["rows"]) == hopper.NAMES
        assert tuple(map(int, by["ptxas"].split("."))) >= chips.HOPPER_PTXAS
        assert not [x for n, row in by["rows"].items() for x in faults(n, row, version)]
    assert hopper.in_document() == hopper.table(written)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("forward d 64", {"stores of spills": 1}),
        ("forward d 64", {"loads of spills": 1}),
        ("backward d 64", {"stores of spills": 1}),
        ("forward d 64", {"groups": 5}),
        ("backward d 64", {"groups": 6}),
        ("backward d 64", {"overwritten": 1}),
        ("forward d 64", {"overwritten without waits": 0}),
        ("forward d 64", {"registers": 171}),
        ("forward d 64", {"registers of the loop": 255}),
        ("forward d 64", {"shared": 232449}),
        ("forward d 64", {"stores": {"4": 4}}),
        ("backward d 64", {"stores": {"2": 64, "TMA": 2}}),
        ("backward d 64", {"stores": {"4": 64, "TMA": 2}}),
        ("forward d 128, packed", {"stores": {"4": 64}}),
        ("ffn down", {"registers": 129}),
        ("ffn down", {"registers of the loop": 161}),
        ("ffn down", {"loads of spills of a trip": 1}),
        ("ffn down", {"groups": 8}),
        ("ffn down", {"cluster": {"multicasts": 0, "arrivals": 3, "barriers": 2}}),
        ("ffn down", {"cluster": {"multicasts": 2, "arrivals": 2, "barriers": 2}}),
        ("ffn down", {"cluster": {"multicasts": 2, "arrivals": 3, "barriers": 1}}),
        ("forward d 64", {"cluster": {"multicasts": 2, "arrivals": 3, "barriers": 2}}),
    ],
)
def test_each_fault_is_found(name: str, change: dict[str, Any]) -> None:
    row = hopper.written()[max(hopper.written())]["rows"][name]
    assert not faults(name, row)
    assert len(faults(name, row | change)) == 1


def test_the_time_of_turns() -> None:
    """The document's table, and two programs of one head, each of four trips."""
    assert turns.table() in hopper.DOCUMENT.read_text()
    without = turns.ENDS + 4 * turns.TRIP + turns.READ
    last = turns.WRITTEN + turns.SEEN + turns.READ + turns.WRITTEN
    assert turns.clocks(256, 1, causal=False, turns=False) == without
    assert turns.clocks(256, 1, causal=False, turns=True) == without + last


# --- the reading ----------------------------------------------------------------------------------

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24"


def consumer(*inside: str) -> sass.Code:
    """A loop of two products, each of two wgmmas, around `inside`."""
    lines = [PRODUCT, f"{PRODUCT}, gsb0", *inside, "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    return sass.instructions(listing("MOV R1, R2", *lines * 2, "@P0 BRA 0x10", "EXIT"))


def test_a_loop_is_read() -> None:
    row = hopper.read(consumer("STL [R1], R30", "LDL R239, [R1]"))
    assert (row["wgmmas"], row["groups"]) == (4, 2)
    assert (row["stores of spills"], row["loads of spills"]) == (2, 2)
    assert row["registers of the loop"] == 240
    assert (row["trip"], row["overwritten"]) == (11, 0)
    assert hopper.read(consumer("MOV R5, R6"))["overwritten"] > 0
    stores = hopper.read(consumer("STG.E.U16 [R8.64], R9", "STG.E.128 [R8.64], R12"))["stores"]
    assert stores == {"2": 2, "16": 2}


def test_an_atomic_costs_the_latency_of_a_load_where_its_scoreboard_is_awaited() -> None:
    """CONTROL, of every instruction of a listing, names a scoreboard only where it is edited."""

    def share(opcode: str) -> float:
        *products, access = sass.instructions(listing(*[PRODUCT] * 8, f"{opcode} R9, [R8.64]"))
        access = access._replace(write_barrier=0)
        first = products[0]._replace(wait=1)
        return model.estimate([first, *products[1:], access], model.CHIPS[90], 1, 1)[0]

    assert share("ATOMG.E.ADD.STRONG.GPU") < 0.8 * share("STG.E")
    assert share("ATOMG.E.ADD.STRONG.GPU") == share("LDG.E")
