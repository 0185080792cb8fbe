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


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
    """Run `kernel` over `grid` on the device of its first argument; an empty grid does nothing.

    Returns what Triton returns: the compiled kernel, where there is one.
    """
    if 0 in grid:
        return None
    for recorder in _recorders:
        recorder.append(Launch(kernel, grid, args, constants))
    with contextlib.nullcontext() if _is_current(args[0]) else torch.cuda.device(args[0].device):
        # Products and sums as one instruction: Triton's default until 3.9, not after it.
        return kernel[grid](*args, **constants, enable_fp_fusion=True)


def _is_current(tensor: torch.Tensor) -> bool:
    """Whether the tensor's device is torch's current one, or a CPU."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()


class Prepared:
    """A launch apart from its tensors, for a plan that is used many times.

    Triton binds, specialises and hashes every argument of every launch, which takes 30 to 40 us of
    the host for an attention kernel. A prepared launch keeps the compiled kernel that the first
    call got and hands it the arguments. So all its calls must agree in all that Triton compiles
    for: which pointers are None, their dtypes, their device. The kernel's parameters are pointers,
    then numbers, then constants. Tensors at addresses that are no multiple of 16, for which another
    kernel is compiled, take the ordinary way.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int], numbers: tuple[Any, ...], **constants: Any
    ) -> None:
        self._launch = kernel, grid, numbers, constants
        self._given: list[int] = []  # places of the pointers that are not None
        self._rest: tuple[Any, ...] = ()  # the arguments after the pointers
        self._run: Any = None  # of the compiled kernel

    def __call__(self, *pointers: Any) -> None:
        if (
            self._run is not None
            and not _recorders
            and self._aligned(pointers)
            and _is_current(pointers[0])
        ):
            self._run(*pointers, *self._rest)
            return
        kernel, grid, numbers, constants = self._launch
        compiled = launch(kernel, grid, *pointers, *numbers, **constants)
        if self._run is None and _is_compiled(compiled):
            self._given = [place for place, pointer in enumerate(pointers) if pointer is not None]
            if self._aligned(pointers):
                in_order = (constants[name] for name in kernel.arg_names if name in constants)
                self._rest = (*numbers, *in_order)
                three_axes = (*grid, 1, 1)
                self._run = compiled[three_axes]

    def _aligned(self, pointers: tuple[Any, ...]) -> bool:
        addresses = 0
        for place in self._given:
            addresses |= pointers[place].data_ptr()
        return addresses & 15 == 0


def _is_compiled(kernel: Any) -> bool:
    """Whether a launch's result can be launched again; an interpreter has none."""
    from triton.compiler import CompiledKernel

    return isinstance(kernel, CompiledKernel)
