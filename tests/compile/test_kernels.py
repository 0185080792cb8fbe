"""Every Triton kernel, compiled for GPUs that are not there: registers, shared memory, tensor cores."""

from __future__ import annotations

from typing import Any

import pytest
from compile.offline import report

from fastattn import chips

# Bytes of registers that a thread of an attention kernel may spill; 0 for every other kernel.
SPILLS = {
    "_forward_kernel": 128,  # none in a loop
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
    "linear": ("_forward_kernel",),
    "layer_norm": (),
    "cross_entropy": (),
    "linear_cross_entropy": ("_forward_kernel", "_gradient_kernel"),
    "rotary": (),
}


def spills_allowed(op: str, kernel: dict[str, Any]) -> int:
    if op != "attention" or kernel["kernel"] not in SPILLS:
        return 0
    wide = WIDE.get((kernel["kernel"], kernel["head_dim"]), 0)
    everything = EVERYTHING if kernel["features"] == "everything" else 0
    return max(SPILLS[kernel["kernel"]], everything, wide if kernel["dtype"] == "float32" else 0)


# Attention takes minutes a chip; the hot kernels of all are compiled by tests/guard too.
GRIDS = [
    pytest.param(
        op,
        chip,
        marks=[pytest.mark.long] * (op != "cross_entropy" or chip != 90),
    )
    for op in PRODUCTS
    for chip in (80, 90, 100)
]


@pytest.mark.parametrize(("op", "architecture"), GRIDS)
def test_resources(op: str, architecture: int) -> None:
    # Each feature by itself is compiled only for Hopper: attention takes minutes a chip.
    grids = {80: "attention, rows", 100: "attention, own rows"}
    kernels = report(grids.get(architecture, op) if op == "attention" else op, architecture)
    assert kernels
    over = []
    for kernel in kernels:
        name = kernel["kernel"]
        if kernel["spills"] > spills_allowed(op, kernel):
            over.append(f"{name} spills {kernel['spills']} bytes: {kernel}")
        # sm_86 takes the rows of sm_80, but for float32 above 256, which is refused there.
        refused = kernel["dtype"] == "float32" and kernel.get("head_dim", 0) > 256
        rows_of_86 = op == "attention" and architecture == 80 and not refused
        if kernel["shared"] > chips.shared_memory(86 if rows_of_86 else architecture):
            over.append(f"{name} takes {kernel['shared']} bytes of shared memory: {kernel}")
        if op == "attention" and name in STORES:
            never = name in ("_forward_kernel", "_keys_kernel") and not kernel["wide_stores"]
            if never or kernel["narrow_stores"]:
                over.append(f"{name} stores fewer than 16 bytes a thread: {kernel}")
        if kernel["serialised"]:
            over.append(f"{name} has wgmmas that wait for each other (ptxas: C7515): {kernel}")
        if kernel["overwritten"]:
            over.append(f"{name} overwrites the operand of a wgmma under way: {kernel}")
        tensor_cores = kernel["dtype"] != "float32" or kernel.get("features") == "tf32x3"
        wanted = name in PRODUCTS[op] and tensor_cores
        if wanted and not kernel["tensor_core"]:
            over.append(f"{name} has no tensor-core instruction: {kernel}")
    assert not over, "\n".join(over)
    assert set(PRODUCTS[op]) <= {kernel["kernel"] for kernel in kernels}
