"""Launching Triton kernels: the one door between our launchers and Triton's runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


def architecture(device: torch.device) -> int:
    """Compute capability of `device` as 10 * major + minor, e.g. 90 for an H100.

    The interpreter (CPU tensors) takes the tables' rows of sm_90.
    """
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; a small number for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was launched with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> None:
        """Launch it (again)."""
        launch(self.kernel, self.grid, *self.args, **self.constants)


_recorders: list[list[Launch]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches made inside, which run as ever."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument; an empty grid does nothing."""
    if 0 in grid:
        return
    for recorder in _recorders:
        recorder.append(Launch(kernel, grid, args, constants))
    device = args[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, **constants)
