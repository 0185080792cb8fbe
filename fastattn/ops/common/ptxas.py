"""Which ptxas assembles Triton's kernels, which others are at hand, and which are to be avoided.

Triton carries two, `ptxas` and `ptxas-blackwell`, and takes one by architecture; the environment
variables TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH put another one in their places.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastattn import chips

VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


class Ptxas(NamedTuple):
    """A program and its version, e.g. (13, 3)."""

    path: str
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.path}, version {'.'.join(map(str, self.version))}"


def in_use(architecture: int) -> Ptxas:
    """The one that assembles for `architecture`, e.g. 90.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: Triton finds none that can be run.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(architecture)
    major, minor = tool.version.split(".")
    return Ptxas(tool.path, (int(major), int(minor)))


def others(architecture: int) -> list[Ptxas]:
    """Those of other versions that are at hand, the newest first, a version once.

    Looked for in Triton, in NVIDIA's packages, in CUDA_HOME, on PATH and in /usr/local/cuda.
    """
    found: dict[tuple[int, int], Ptxas] = {}
    for path in _places():
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        except OSError:  # it cannot be run here
            continue
        if (release := re.search(r"release (\d+)\.(\d+)", said)) is not None:
            version = int(release[1]), int(release[2])
            found.setdefault(version, Ptxas(str(path), version))
    found.pop(in_use(architecture).version, None)
    return sorted(found.values(), key=lambda ptxas: ptxas.version, reverse=True)


def _places() -> Iterator[Path]:
    for package, pattern in (("triton", "backends/nvidia/bin/ptxas*"), ("nvidia", "*/bin/ptxas")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))
    homes = [f"{home}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    path = os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    if (found := shutil.which("ptxas", path=path)) is not None:
        yield Path(found)


def warning(architecture: int) -> str | None:
    """The fault of the one in use, and the fix; None if there is none."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    used = in_use(architecture)
    if not 90 <= architecture < 100 or used.version >= chips.HOPPER_PTXAS:
        return None
    newer = [ptxas for ptxas in others(architecture) if ptxas.version >= chips.HOPPER_PTXAS]
    blackwell = get_ptxas(architecture) == knobs.nvidia.ptxas_blackwell
    place = newer[0].path if newer else "the ptxas of PyPI's nvidia-cuda-nvcc, 13.3 or later"
    return (
        "on Hopper, ptxas before 13.3 may overwrite registers that a wgmma still reads, and "
        f"results may be wrong: set {VARIABLES[blackwell]} to {place}"
    )
