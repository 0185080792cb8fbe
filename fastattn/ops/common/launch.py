"""Launching Triton kernels: the one door between our launchers and Triton's runtime."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
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


class CannotRun(RuntimeError):
    """The kernels cannot run this call, which its metadata did not say; nothing has run."""


class NotCompiled(CannotRun):
    """A kernel does not compile, so that no call of its kind can run."""


CALL, KERNEL = "call", "kernel"
# CUDA's words for a launch that it refuses; after a fault of the device it has others.
REFUSED = {
    "Failed to create tensor map descriptor": CALL,
    "invalid argument": CALL,
    "invalid configuration argument": CALL,
    "too many resources requested for launch": KERNEL,
    "invalid device function": KERNEL,
    "no kernel image is available for execution on the device": KERNEL,
    "device kernel image is invalid": KERNEL,
    "a PTX JIT compilation failed": KERNEL,
    "the provided PTX was compiled with an unsupported toolchain": KERNEL,
}
FROM = ("fastattn: kernel ", "Triton Error [CUDA]: ")  # csrc/device/launch.cuh, Triton's driver


def refused(error: Exception) -> str | None:
    """CALL or KERNEL if a launch was refused for this call, or would be for any; else None."""
    if isinstance(error, CannotRun):
        return KERNEL if isinstance(error, NotCompiled) else CALL
    errors = sys.modules.get("triton.runtime.errors")
    if errors is not None and isinstance(error, errors.OutOfResources):
        return KERNEL
    text = str(error)
    if isinstance(error, RuntimeError) and any(name in text for name in FROM):
        return next((which for words, which in REFUSED.items() if f": {words}" in text), None)
    return None


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


@contextlib.contextmanager
def compilations() -> Iterator[dict[str, float | None]]:
    """Collect the Triton kernels compiled inside, by name: seconds, None for one from the cache."""
    from triton import knobs

    seconds: dict[str, float | None] = {}

    def note(metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        name = metadata["name"]
        if cache_hit:
            seconds.setdefault(name, None)
        else:
            seconds[name] = (seconds.get(name) or 0.0) + 1e-6 * times.total

    with knobs.compilation.scope():
        knobs.compilation.listener = note
        yield seconds


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
    """Run `kernel` over `grid` on the device of its first argument; an empty grid does nothing.

    Returns what Triton returns: the compiled kernel, where there is one.

    Raises:
        NotCompiled: by the error of the compiler.
    """
    if 0 in grid:
        return None
    _watch(kernel)
    for recorder in _recorders:
        recorder.append(Launch(kernel, grid, args, constants))
    with contextlib.nullcontext() if _is_current(args[0]) else torch.cuda.device(args[0].device):
        # Products and sums as one instruction: Triton's default until 3.9, not after it.
        return kernel[grid](*args, **constants, enable_fp_fusion=True)


def _watch(kernel: Any) -> None:
    """Let `kernel` raise NotCompiled for whatever its compiler raises."""
    compile = getattr(kernel, "_do_compile", None)  # Triton's method compiles, and runs nothing
    if compile is not None and not hasattr(compile, "watched"):
        kernel._do_compile = _watched(compile)


def _watched(compile: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile)
    def inside(*args: Any, **kwargs: Any) -> Any:
        try:
            return compile(*args, **kwargs)
        except Exception as error:
            raise NotCompiled(f"{type(error).__name__}: {error}") from error

    inside.watched = True  # type: ignore[attr-defined]
    return inside


def _is_current(tensor: torch.Tensor) -> bool:
    """Whether the tensor's device is torch's current one, or a CPU."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()


class Prepared:
    """A launch apart from its tensors, for a plan that is used many times.

    Triton binds, specialises and hashes every argument of every launch, which takes 30 to 40 us of
    the host for an attention kernel. A prepared launch keeps the compiled kernel that the first
    call got and hands it the arguments. So all its calls must agree in all that Triton compiles
    for: which pointers are None, their dtypes, their device. The kernel's parameters are pointers,
    then TMA descriptors, numbers, and constants. Tensors at addresses that are no multiple of 16,
    for which another kernel is compiled, take the ordinary way.

    A kernel that does not compile is not compiled again.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int], numbers: tuple[Any, ...], **constants: Any
    ) -> None:
        self._launch = kernel, grid, numbers, constants
        self._given: list[int] = []  # places of the pointers that are not None
        self._rest: tuple[Any, ...] = ()  # the arguments after the pointers
        self._run: Any = None  # of the compiled kernel
        self._not_compiled = ""  # the compiler's error

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
        if self._not_compiled:
            raise NotCompiled(self._not_compiled)
        try:
            compiled = launch(kernel, grid, *pointers, *numbers, **constants)
        except NotCompiled as error:
            self._not_compiled = str(error)
            raise
        if self._run is None and _is_compiled(compiled):
            self._given = [n for n, x in enumerate(pointers) if isinstance(x, torch.Tensor)]
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
