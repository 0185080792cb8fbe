"""Kernels in Gluon, Triton's low-level dialect, for Hopper: names, launching, and who may run them.

A kernel imports `tma` and `mbarrier` from here, where they have Triton 3.8's names on Triton 3.6 to
3.9. Its first argument is a tensor, its tiles come by host descriptors, and its programs have 4
warps, as every partition has (triton-lang/triton#11047). `launch` runs it: on a GPU with the newest
ptxas that Triton carries, because one before 13.3 may overwrite registers that a wgmma still reads.
For tests, `use` gives the launch of an emulator, which runs kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia import compiler
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn import backends, chips
from fastattn.ops.common import descriptors
from fastattn.ops.common import launch as door
from fastattn.ops.common.descriptors import ALIGNMENT, reads
from fastattn.ops.common.ptxas import Ptxas

__all__ = [
    "Geometry",
    "Prepared",
    "descriptor",
    "launch",
    "readable",
    "reads",
    "unavailable",
    "use",
]

WARPS = 4
BEFORE_3_8 = {
    "async_load": "async_copy_global_to_shared",
    "async_store": "async_copy_shared_to_global",
}

# --- names ----------------------------------------------------------------------------------------


def _completed(module: types.ModuleType, **missing: Any) -> types.ModuleType:
    """A copy of `module` with the names that it lacks."""
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update({**missing, **vars(module)})
    return copy


_barrier_layout = gl.constexpr(hopper.mbarrier.MBarrierLayout())


@gluon.jit
def _allocate_mbarrier(batch: gl.constexpr = None):
    shape: gl.constexpr = [1] if batch is None else [batch, 1]
    return gl.allocate_shared_memory(gl.int64, shape, _barrier_layout)


tma: Any = _completed(
    hopper.tma,
    **{
        new: getattr(hopper.tma, old)
        for new, old in BEFORE_3_8.items()
        if hasattr(hopper.tma, old) and not hasattr(hopper.tma, new)
    },
)
mbarrier: Any = _completed(hopper.mbarrier, allocate_mbarrier=_allocate_mbarrier)
REDUCES = hasattr(tma, "async_atomic_add")  # Triton 3.8


# --- who may run them -----------------------------------------------------------------------------


@functools.cache
def assembler() -> Ptxas:
    """The newest ptxas that the installed Triton carries, or that its variables name."""
    found = []
    for tool in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell):
        major, minor = tool.version.split(".")
        found.append(Ptxas(tool.path, (int(major), int(minor))))
    return max(found, key=lambda ptxas: ptxas.version)


def unavailable(device: torch.device, *, reduces: bool = False) -> str | None:
    """The reason why no Gluon kernel can run on `device`, or None.

    Args:
        reduces: the kernel adds to global memory by TMA, which Triton 3.8 has first.
    """
    if (reason := backends.gluon_unavailable(device)) is not None:
        return reason
    if reduces and not REDUCES:
        return "this kernel needs TMA reductions, which Triton has from 3.8"
    if device.type == "cuda" and (newest := assembler()).version < chips.HOPPER_PTXAS:
        return (
            "on Hopper, ptxas before 13.3 may assemble wgmma wrongly, and Triton's newest is "
            f"{newest}: update Triton, or set TRITON_PTXAS_PATH"
        )
    return None


def use(launcher: Callable[..., Any] | None) -> None:
    """Run Gluon kernels on CPU tensors by an emulator's `launcher`, or no longer. Only for tests.

    Args:
        launcher: (kernel, grid, *args, num_warps=, **constants).
    """
    global _launcher
    _launcher = launcher
    backends.gluon_on_cpu = launcher is not None


_launcher: Callable[..., Any] | None = None


# --- launching ------------------------------------------------------------------------------------


class Geometry:
    """A host descriptor apart from its address, of which any number are made for little.

    Beyond the bounds of its tensor it reads zeros.
    """

    def __init__(self, name: str, x: torch.Tensor, box: Sequence[int], swizzle: int = 128) -> None:
        """
        Args:
            name: of the tensor, for errors.
            x: a tensor of these sizes, strides and dtype.
            box: powers of two, at most 256 each; 1 for dimensions that a copy takes one of.
            swizzle: bytes of a row of the swizzled layout in shared memory.

        Raises:
            launch.CannotRun: no descriptor can be made of `x`.
        """
        if (reason := descriptors.misfit(**{name: x})) is not None:
            raise door.CannotRun(reason)
        size = x.element_size()
        strides = [ALIGNMENT // size if n == 1 else s for n, s in zip(x.shape, x.stride())]
        strides[-1] = 1
        layout = _layout(swizzle, size, len(box))
        self._name = name
        self._parts = vars(TensorDescriptor(x, list(x.shape), strides, list(box), layout))
        del self._parts["base"]

    def at(self, x: torch.Tensor) -> TensorDescriptor:
        """The descriptor of a tensor, of whose metadata only the address is read.

        Raises:
            launch.CannotRun: its address is not aligned.
        """
        if x.data_ptr() % ALIGNMENT:
            raise door.CannotRun(descriptors.misfit(**{self._name: x}))
        made = TensorDescriptor.__new__(TensorDescriptor)  # without its checks, which take 2 us
        made.__dict__ = {"base": x, **self._parts}
        return made


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where a descriptor can be made of it, else a copy."""
    return x if reads(x) else x.clone(memory_format=torch.contiguous_format)


def descriptor(x: torch.Tensor, box: Sequence[int], swizzle: int = 128) -> TensorDescriptor:
    """A host descriptor of `x`; `box` and `swizzle` as of `Geometry`."""
    return Geometry("a tensor", x, box, swizzle).at(x)


@functools.cache
def _layout(swizzle: int, size: int, rank: int) -> Any:
    return gl.NVMMASharedLayout(swizzle, 8 * size, rank=rank)


class Prepared:
    """A launch apart from its tensors, for a plan that is used many times (launch.Prepared).

    It keeps what its descriptors say of sizes and strides. Triton's launcher encodes each of them
    for the device from the address that it then has, so that no address outlives a call, and a CUDA
    graph keeps the encoded one with the launch.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int],
        geometries: Sequence[Geometry],
        numbers: tuple[Any, ...],
        **constants: Any,
    ) -> None:
        self._geometries = geometries
        self._emulated = kernel, grid, numbers, constants
        self._run = door.Prepared(
            _with_newest_ptxas(kernel), grid, numbers, num_warps=WARPS, **constants
        )

    def __call__(self, pointers: Sequence[torch.Tensor | None], *described: torch.Tensor) -> None:
        """Run it.

        Args:
            pointers: the kernel's first arguments; a tensor first, whose device runs it.
            described: the tensors of its descriptors.

        Raises:
            launch.CannotRun: one of them is at an address of which no descriptor can be made.
            launch.NotCompiled: by the compiler's error.
        """
        given = [geometry.at(x) for geometry, x in zip(self._geometries, described, strict=True)]
        if _launcher is None or not pointers[0].is_cpu:  # type: ignore[union-attr]
            self._run(*pointers, *given)
        else:
            kernel, grid, numbers, constants = self._emulated
            launch(kernel, grid, *pointers, *given, *numbers, **constants)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = WARPS, **constants: Any
) -> None:
    """Run `kernel` over `grid`; an empty grid does nothing.

    Args:
        args: a tensor first, whose device runs it.
    """
    if _launcher is not None and args[0].is_cpu:
        if 0 not in grid:
            _launcher(kernel, grid, *args, num_warps=num_warps, **constants)
        return
    door.launch(_with_newest_ptxas(kernel), grid, *args, num_warps=num_warps, **constants)


def _with_newest_ptxas(kernel: Any) -> Any:
    """`kernel`, which from here on is compiled with the newest ptxas."""
    if not hasattr(kernel, "_fastattn_assembled"):  # Triton's method compiles, and runs nothing
        kernel._do_compile = _assembled(kernel._do_compile)
        kernel._fastattn_assembled = True
    return kernel


def _assembled(compile: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with newest_assembler():
            return compile(*args, **kwargs)

    return inside


@contextlib.contextmanager
def newest_assembler() -> Iterator[None]:
    """Triton compiles with `assembler()` inside, whatever it takes for the architecture."""
    path = assembler().path
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = path
        knobs.nvidia.ptxas_blackwell = path
        compiler.get_ptxas_version.cache_clear()  # it is part of the key of Triton's cache
        try:
            yield
        finally:
            compiler.get_ptxas_version.cache_clear()
