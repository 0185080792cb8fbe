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
from typing import Any, NamedTuple

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
from fastattn.ops.common.plans import PlanCache
from fastattn.ops.common.ptxas import Ptxas

WARPS = 4
ALIGNMENT = descriptors.ALIGNMENT
reads = descriptors.reads
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
CLUSTERS = REDUCES  # 3.7 has some of it, which no test here has compiled


# --- who may run them -----------------------------------------------------------------------------


@functools.cache
def assembler() -> Ptxas:
    """The newest ptxas that the installed Triton carries, or that its variables name.

    Raises:
        RuntimeError: none of them can be run.
    """
    found = []
    for name in ("ptxas", "ptxas_blackwell"):
        with contextlib.suppress(RuntimeError):  # Triton cannot run this one
            tool = getattr(knobs.nvidia, name)
            major, minor = tool.version.split(".")
            found.append(Ptxas(tool.path, (int(major), int(minor))))
    if not found:
        raise RuntimeError("Triton finds no ptxas that can be run: set TRITON_PTXAS_PATH")
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
    if device.type != "cuda":
        return None
    try:
        newest = assembler()
    except RuntimeError as error:
        return str(error)
    if newest.version < chips.HOPPER_PTXAS:
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


class _Geometry:
    """A descriptor apart from its address, checked; there is one for each sizes and strides."""

    def __init__(
        self,
        name: str,
        x: torch.Tensor,
        box: Sequence[int],
        swizzle: int,
        second: Sequence[int] | None,
    ) -> None:
        if (reason := descriptors.misfit(**{name: x})) is not None:
            raise door.CannotRun(reason)
        size = x.element_size()
        strides = [ALIGNMENT // size if n == 1 else s for n, s in zip(x.shape, x.stride())]
        strides[-1] = 1
        cluster = {} if second is None else {"cga_layout": [list(second)]}
        layout = gl.NVMMASharedLayout(swizzle, 8 * size, rank=len(box), **cluster)
        made = TensorDescriptor(x, list(x.shape), strides, list(box), layout)
        self.parts = {**vars(made), "base": None, "geometry": self}


_geometries: PlanCache[_Geometry] = PlanCache()


def descriptor(
    x: torch.Tensor,
    box: Sequence[int],
    swizzle: int = 128,
    name: str = "a tensor",
    second: Sequence[int] | None = None,
) -> TensorDescriptor:
    """A host descriptor of `x`, whose boxes are `box`; beyond its bounds it reads zeros.

    Args:
        box: powers of two, at most 256 each; 1 for dimensions that a copy takes one of.
        swizzle: bytes of a row of the swizzled layout in shared memory.
        name: of the tensor, for the error.
        second: in a cluster of two, which part of the box is the second program's: after the
            first's along the dimension with a 1; zeros: each has the whole box.

    Raises:
        launch.CannotRun: no descriptor can be made of `x` (descriptors.misfit).
    """
    key = x.shape, x.stride(), x.dtype, swizzle, second and tuple(second), *box
    geometry = _geometries.get(key)
    if geometry is None:
        geometry = _Geometry(name, x, box, swizzle, second)
        _geometries.put(key, geometry)
    if x.data_ptr() % ALIGNMENT:
        raise door.CannotRun(descriptors.misfit(**{name: x}))
    made: TensorDescriptor = TensorDescriptor.__new__(TensorDescriptor)  # its checks take 2 us
    made.__dict__.update(geometry.parts)
    made.base = x
    return made


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where a descriptor can be made of it, else a copy."""
    return x if reads(x) else x.clone(memory_format=torch.contiguous_format)


def descriptor_or_copy(x: torch.Tensor, box: Sequence[int]) -> TensorDescriptor:
    """`descriptor` of `x`, or of a copy where none can be made of `x` itself."""
    try:
        return descriptor(x, box)
    except door.CannotRun:
        return descriptor(x.clone(memory_format=torch.contiguous_format), box)


class _Kept(NamedTuple):
    """The launches that agree in all but their addresses."""

    pointers: int  # tensors and descriptors, the first arguments
    run: door.Prepared


_kept: PlanCache[_Kept] = PlanCache()


def launch(
    kernel: Any, grid: tuple[int], *args: Any, num_warps: int = WARPS, **constants: Any
) -> None:
    """Run `kernel` over `grid`; an empty grid does nothing.

    A launch that agrees with an earlier one in all but addresses takes what that one has compiled
    (launch.Prepared). Triton's launcher encodes each descriptor for the device from the address
    that it has then: no address outlives a call, and a CUDA graph keeps the encoded one.

    Args:
        grid: of programs, or of clusters where `constants` have `num_ctas`.
        args: tensors, the first of which says where it runs, or None; descriptors; numbers.

    Raises:
        launch.NotCompiled: by the error of the compiler.
    """
    if _launcher is not None and args[0].is_cpu:
        if 0 not in grid:
            _launcher(kernel, grid, *args, num_warps=num_warps, **constants)
        return
    facts = [
        x if x is None or type(x) in _NUMBERS
        else x.dtype if isinstance(x, torch.Tensor)
        else x.geometry
        for x in args
    ]  # fmt: skip
    # The plan holds the kernel, whose own hash is that of all its sources.
    key = id(kernel), grid, args[0].device, num_warps, *facts, *constants.values()
    kept = _kept.get(key)
    if kept is None:
        pointers = sum(type(x) not in _NUMBERS for x in args)
        run = door.Prepared(
            _with_newest_ptxas(kernel), grid, args[pointers:], num_warps=num_warps, **constants
        )
        kept = _Kept(pointers, run)
        _kept.put(key, kept)
    kept.run(*args[: kept.pointers])


_NUMBERS = (int, float)


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
