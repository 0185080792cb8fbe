"""Limits of NVIDIA GPUs by architecture, the compute capability as 10 * major + minor.

Source: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

REGISTERS = 65536  # of a multiprocessor, 32 bits each
MOST_REGISTERS = 255  # of a thread

_SHARED_KILOBYTES = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
_LEAST_SHARED_KILOBYTES = 99  # of all others since sm_80

# Multiprocessors of A100, H100 and H200, B200: for compiling and counting without a GPU.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}

# An older ptxas may let other code overwrite the registers that an asynchronous wgmma still reads
# (triton-lang/triton issues 9433 and 11781).
HOPPER_PTXAS = (13, 3)


def shared_memory(architecture: int) -> int:
    """Bytes of shared memory that one block may use."""
    return 1024 * _SHARED_KILOBYTES.get(architecture, _LEAST_SHARED_KILOBYTES)


def all_registers(num_warps: int) -> int:
    """The most registers a thread of a program may have.

    A kernel asks for them (`maxnreg`) where ptxas would rather spill a few than let fewer programs
    run at a time.
    """
    return min(MOST_REGISTERS, REGISTERS // (32 * num_warps))
