"""Limits of NVIDIA GPUs by architecture, the compute capability as 10 * major + minor.

Source: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

import re
from typing import NamedTuple

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


# Dense products in bfloat16, accumulated in float32, in 10^12 operations a second, by the words of
# the device's name in CUDA; the first that it has. Sources: NVIDIA's data sheets (halved where they
# count sparse products), for the RTX the white papers of their architectures.
_PEAK_TERAFLOPS = {
    "GB200": 2500, "B200": 2250, "B100": 1750, "GH200": 989.4, "H200": 989.4, "H100 PCIe": 756.5,
    "H100 NVL": 835.5, "H100": 989.4, "A100": 312, "A800": 312, "A30": 165, "A10": 125, "A10G": 70,
    "L40S": 362.05, "L40": 181.05, "L4": 121, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(name: str) -> float | None:
    """Operations a second of dense bfloat16 products; None for a chip that is not in the table.

    Args:
        name: `torch.cuda.get_device_name`'s.
    """
    for known, teraflops in _PEAK_TERAFLOPS.items():
        if re.search(rf"\b{known}\b", name):
            return teraflops * 1e12
    return None


class Device(NamedTuple):
    """A GPU as a part of a cluster: bytes, and bytes a second in one direction.

    Attributes:
        memory: of the GPU.
        inside: to the other GPUs of its machine, by NVLink and NVSwitch.
        outside: of the GPU's own network card, to other machines.
        machine: how many GPUs a machine has.
    """

    memory: float
    inside: float
    outside: float
    machine: int


# NVIDIA's data sheets of DGX A100 (80 GB), DGX H100, DGX H200 and DGX B200: memory of the system
# by 8; NVLink's bandwidth halved, as they count both directions; network cards of 200 or 400 Gb/s,
# one for each GPU.
DEVICES = {
    "A100": Device(80e9, 300e9, 25e9, 8),
    "H100": Device(80e9, 450e9, 50e9, 8),
    "H200": Device(141e9, 450e9, 50e9, 8),
    "B200": Device(180e9, 900e9, 50e9, 8),
}
