"""Reading machine code: the main loop, a trip through it, and the two checks of wgmmas."""

from __future__ import annotations

from typing import Any

import pytest
from compile import cuda, sass
from compile.offline import main_loop

CONTROL = 0x000FC20000000000  # one clock, no scoreboard


def listing(*lines: str) -> str:
    """As cuobjdump prints it: an instruction every 16 bytes, then its encoding."""
    return "".join(
        f"        /*{16 * n:04x}*/  {line} ;  /* 0x000fe20000000a00 */\n{'':40}/* {CONTROL:#018x} */\n"
        for n, line in enumerate(lines)
    )


EDGE = ["LDSM.16.M88.4 R4, [R2]", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "ISETP.GE.AND P0, PT, R1"]
INNER = ["LDSM.16.M88.4 R4, [R2]", "@!P1 HMMA.16816.F32.BF16 R8, R4, R6, R8"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # A loop over heads holds both loops over tiles: at the edge, and the shorter one inside.
        (
            [
                "MOV R1, c[0x0][0x28]",
                *EDGE, "@P0 BRA 0x10",
                *INNER, "@!P2 BRA 0x50",
                "STG.E [R2], R8", "@P3 BRA 0x10",
                "EXIT", "BRA 0xb0", "NOP",
            ],
            {"of": "the loop", "instructions": 3, "tensor core": 1, "shared accesses": 1},
        ),
        # Without tensor cores the loads decide, and a loop that waits for a barrier is none.
        (
            [
                "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", "@!P0 BRA 0x0",
                "LDG.E.128 R4, [R2.64]", "STG.E [R2], R4", "@P1 BRA 0x20",
                "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R6.64]", "IMAD.MOV.U32 R2, RZ, RZ, R6",
                "@P2 BRA 0x50",
                "EXIT", "BRA 0xa0",
            ],
            {"of": "the loop", "instructions": 4, "global loads": 2, "moves and conversions": 1},
        ),
        (
            ["LDG.E R4, [R2.64]", "MUFU.RSQ R4, R4", "STL [R1], R4", "EXIT", "BRA 0x40", "NOP"],
            {
                "of": "the whole kernel, which has no loop",
                "instructions": 4, "global loads": 1, "exponentials": 1, "spill accesses": 1,
            },
        ),
    ],
    ids=["tensor cores", "loads", "no loop"],
)  # fmt: skip
def test_main_loop(lines: list[str], expected: dict[str, Any]) -> None:
    found = main_loop(sass.instructions(listing(*lines)))
    assert {name: count for name, count in found.items() if count} == expected


def test_a_trip_jumps_over_what_it_can_but_not_over_products_and_copies() -> None:
    lines = [
        "MOV R1, R2",
        "@!P0 BRA 0x40",
        "FSEL R3, R4, R5, P1",
        "FSEL R3, R4, R5, P1",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P1 BRA 0x70",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
        "BRA.DIV ~URZ, 0xa0",
        "@P2 BRA 0x10",
        "EXIT",
        "BRA 0x80",
    ]
    code = sass.instructions(listing(*lines))
    assert cuda.trip(code) == {"instructions": 6, "tensor core": 1}
    without = [line.replace("HMMA", "FFMA") for line in lines]
    assert cuda.trip(sass.instructions(listing(*without))) is None


FENCE, WAIT = "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
REGISTERS = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24"


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        ([FENCE, SHARED, SHARED, SHARED + ", gsb0", WAIT], 0),
        ([FENCE, *[SHARED + ", gsb0", WAIT] * 3], 3),
        ([FENCE, SHARED + ", gsb0", WAIT], 0),  # a tile of one product
    ],
)
def test_serialised_wgmmas(lines: list[str], number: int) -> None:
    assert sass.serialised(sass.instructions(listing(*lines))) == number


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        ([REGISTERS + ", gsb0", WAIT, "MOV R5, R1"], 0),
        ([REGISTERS + ", gsb0", "MOV R5, R1", WAIT], 1),
        ([REGISTERS + ", gsb0", "LDSM.16.M88.4 R0, [R2]", WAIT], 0),
        ([REGISTERS + ", gsb0", "LDSM.16.M88.4 R4, [R2]", WAIT], 1),
        ([SHARED + ", gsb0", "MOV R5, R1", WAIT], 0),
        # A wait that lets one group stay open is one for the group before.
        ([REGISTERS + ", gsb0", SHARED + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R5, R1"], 0),
        ([REGISTERS + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R5, R1"], 1),
        # Around a loop: what is written at its start, before the wait for the trip before.
        (["MOV R5, R1", WAIT, REGISTERS + ", gsb0", "@P0 BRA 0x0", WAIT], 1),
        ([WAIT, "MOV R5, R1", REGISTERS + ", gsb0", "@P0 BRA 0x0", WAIT], 0),
    ],
)  # fmt: skip
def test_overwritten_operands(lines: list[str], number: int) -> None:
    code = sass.instructions(listing(*lines))
    assert len(sass.overwritten_operands(code)) == number


def test_the_check_of_operands_sees_the_writes_that_waits_excuse() -> None:
    code = sass.instructions(listing(REGISTERS + ", gsb0", WAIT, "MOV R5, R1"))
    assert len(sass.overwritten_operands(code, heed_waits=False)) == 1
