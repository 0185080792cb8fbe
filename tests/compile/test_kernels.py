"""Every Triton kernel, compiled for GPUs that are not there: registers, shared memory, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OFFLINE = Path(__file__).parent / "offline.py"

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


def report(op: str, architecture: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(OFFLINE.parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    environment["FASTATTN_COMPILE_WORKERS"] = "1"  # pytest-xdist has a worker for every core
    command = [sys.executable, str(OFFLINE), op, str(architecture)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("architecture", (80, 90, 100))
def test_resources(op: str, architecture: int) -> None:
    kernels = report(op, architecture)
    assert kernels
    over = []
    for kernel in kernels:
        name = kernel["kernel"]
        if kernel["spills"] > spills_allowed(op, kernel):
            over.append(f"{name} spills {kernel['spills']} bytes: {kernel}")
        if kernel["shared"] > SHARED_MEMORY[architecture]:
            over.append(f"{name} takes {kernel['shared']} bytes of shared memory: {kernel}")
        tensor_cores = kernel["dtype"] != "float32" or kernel.get("features") == "tf32x3"
        wanted = name in PRODUCTS[op] and tensor_cores
        if wanted and not kernel["tensor_core"]:
            over.append(f"{name} has no tensor-core instruction: {kernel}")
    assert not over, "\n".join(over)
    assert set(PRODUCTS[op]) <= {kernel["kernel"] for kernel in kernels}
