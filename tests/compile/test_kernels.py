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
SPILLS = {"_forward_kernel": 64, "_keys_kernel": 160, "_queries_kernel": 192}
# Kernels whose time is in matrix products.
PRODUCTS = {
    "attention": ("_forward_kernel", "_keys_kernel", "_queries_kernel"),
    "ffn": ("_forward_kernel", "_backward_kernel"),
    "layer_norm": (),
}


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
        if kernel["spills"] > (SPILLS.get(name, 0) if op == "attention" else 0):
            over.append(f"{name} spills {kernel['spills']} bytes: {kernel}")
        if kernel["shared"] > SHARED_MEMORY[architecture]:
            over.append(f"{name} takes {kernel['shared']} bytes of shared memory: {kernel}")
        wanted = name in PRODUCTS[op] and kernel["dtype"] != "float32"
        if wanted and not kernel["tensor_core"]:
            over.append(f"{name} has no tensor-core instruction: {kernel}")
    assert not over, "\n".join(over)
    assert set(PRODUCTS[op]) <= {kernel["kernel"] for kernel in kernels}
