"""Every Triton kernel, compiled for GPUs that are not there: registers, shared memory, tensor cores."""

from __future__ import annotations

from typing import Any

import pytest
from compile.offline import main_loop, report

# Bytes of shared memory that one block may use.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes of registers that a thread of an attention kernel may spill; 0 for every other kernel.
SPILLS = {
    "_forward_kernel": 96,
    "_keys_kernel": 256,  # around the loops, where two accumulators leave no room
    "_queries_kernel": 96,
    "_bias_kernel": 96,
}
EVERYTHING = 512  # with all features at once
# float32 at wide heads: the tiles are as small as products can be.
WIDE = {("_keys_kernel", 256): 1024, ("_keys_kernel", 512): 2304}
# Kernels that store tiles of results, 16 bytes a thread. `_queries_kernel` with ROW_SUMS has no tile.
STORES = ("_forward_kernel", "_keys_kernel", "_queries_kernel", "_append_kernel")
# Kernels whose time is in matrix products.
PRODUCTS = {
    "attention": ("_forward_kernel", "_keys_kernel", "_queries_kernel", "_bias_kernel"),
    "ffn": ("_forward_kernel", "_backward_kernel"),
    "layer_norm": (),
}


def spills_allowed(op: str, kernel: dict[str, Any]) -> int:
    if op != "attention" or kernel["kernel"] not in SPILLS:
        return 0
    wide = WIDE.get((kernel["kernel"], kernel["head_dim"]), 0)
    everything = EVERYTHING if kernel["features"] == "everything" else 0
    return max(SPILLS[kernel["kernel"]], everything, wide if kernel["dtype"] == "float32" else 0)


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("architecture", (80, 90, 100))
def test_resources(op: str, architecture: int) -> None:
    # Each feature by itself is compiled for Hopper alone: attention takes minutes a chip.
    grids = {80: "attention, rows", 100: "attention, own rows"}
    kernels = report(grids.get(architecture, op) if op == "attention" else op, architecture)
    assert kernels
    over = []
    for kernel in kernels:
        name = kernel["kernel"]
        if kernel["spills"] > spills_allowed(op, kernel):
            over.append(f"{name} spills {kernel['spills']} bytes: {kernel}")
        if kernel["shared"] > SHARED_MEMORY[architecture]:
            over.append(f"{name} takes {kernel['shared']} bytes of shared memory: {kernel}")
        if op == "attention" and name in STORES:
            never = name in ("_forward_kernel", "_keys_kernel") and not kernel["wide_stores"]
            if never or kernel["narrow_stores"]:
                over.append(f"{name} stores fewer than 16 bytes a thread: {kernel}")
        tensor_cores = kernel["dtype"] != "float32" or kernel.get("features") == "tf32x3"
        wanted = name in PRODUCTS[op] and tensor_cores
        if wanted and not kernel["tensor_core"]:
            over.append(f"{name} has no tensor-core instruction: {kernel}")
    assert not over, "\n".join(over)
    assert set(PRODUCTS[op]) <= {kernel["kernel"] for kernel in kernels}


def sass(*lines: str) -> str:
    """As cuobjdump prints it: an instruction every 16 bytes, then its encoding."""
    return "".join(
        f"        /*{16 * n:04x}*/  {line} ;  /* 0x000fe20000000a00 */\n{'':40}/* 0x000e */\n"
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
    found = main_loop(sass(*lines))
    assert {name: count for name, count in found.items() if count} == expected
