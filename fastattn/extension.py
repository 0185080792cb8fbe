"""Finds and loads the compiled CUDA C++ extension, lazily, with a reason when there is none.

The extension is the shared library fastattn/_C.abi3.so, which setup.py builds from csrc/ where it
can. It registers the ops `torch.ops.fastattn_cuda.*`. Nothing here runs at the import of fastattn;
the library is loaded when a backend first asks whether it can run.

For tests there is a second library, with the same kernels compiled for the CPU on an emulator
(csrc/emulator). `use(path)` loads it in the first one's place, and no package contains it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

NAMESPACE = "fastattn_cuda"
Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would import torch._dynamo (seconds) for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class CannotLoad(RuntimeError):
    """The library is there, and the dynamic linker or torch refuses it; the message says why."""


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        path: the file.
        built_for: its architectures, in the form of FASTATTN_CUDA_ARCHS.
        toolkit: the version of CUDA that compiled it, e.g. (13, 0).
        device_type: where its ops run: "cuda", or "cpu" if it is the emulator.
    """

    path: Path
    built_for: str
    toolkit: tuple[int, int]
    device_type: str


class Capability(NamedTuple):
    """The compute capability of a GPU."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


_emulator: Library | None = None  # what use() loaded


def use(path: str | Path) -> None:
    """Run the `cuda` backend on CPU tensors, with the emulator's library. Only for tests.

    For the rest of the process: torch cannot unload a library.

    Raises:
        RuntimeError: the library of `fastattn._C`, or another file, is loaded already.
        CannotLoad: the file cannot be loaded.
    """
    global _emulator
    path = Path(path).resolve()
    if _emulator is not None and _emulator.path == path:
        return
    if registered():
        raise RuntimeError(LOADED)
    _emulator = _load(path, "cpu")


def device_type() -> str:
    """Where the kernels run: "cuda", or "cpu" when tests loaded the emulator."""
    return "cuda" if _emulator is None else _emulator.device_type


@constant
def unavailable(device: torch.device) -> str | None:
    """The reason why no kernel of the extension can run on `device`, or None; one line."""
    if _emulator is not None:
        if device.type == _emulator.device_type:
            return None
        return f"the emulator of the CUDA kernels runs on a CPU, not on {device.type!r}"
    if device.type != "cuda":
        where = "a CPU" if device.type == "cpu" else repr(device.type)
        return f"the CUDA kernels run on NVIDIA GPUs, not on {where}"
    if find() is None:
        return NOT_BUILT
    if (reason := _no_gpu()) is not None:
        return reason
    try:
        library = load()
    except CannotLoad as error:
        return f"the extension cannot be loaded: {error}"
    return no_code(library, Capability(*torch.cuda.get_device_capability(device)), driver())


def status() -> str:
    """One line on the extension for people: what it was built for, or why it is not used."""
    if _emulator is not None:
        return f"the emulator of the tests: {_emulator.path}"
    path = find()
    if path is None:
        return NOT_BUILT
    try:
        library = load()
    except CannotLoad as error:
        return f"built, cannot be loaded: {error}"
    built = f"built for {library.built_for} with CUDA {_version(library.toolkit)}"
    reason = _no_gpu()
    return f"{built}, loaded" if reason is None else f"{built}, not used: {reason}"


LOADED = f"{NAMESPACE} has been loaded already, and only one library can be"
NOT_BUILT = (
    "not built, this is a pure Python install: `pip install -v --no-build-isolation .` in a "
    "checkout builds it where nvcc and torch are"
)


@functools.cache
def find() -> Path | None:
    """The built library, or None in a pure Python install."""
    found = importlib.util.find_spec("fastattn._C")
    return None if found is None or found.origin is None else Path(found.origin)


def file() -> Path | None:
    """The library that runs, or would run: the built one, or the tests' emulator."""
    return find() if _emulator is None else _emulator.path


@functools.cache
def _loaded(path: Path) -> Library | CannotLoad:
    if registered():  # torch would end the process
        return CannotLoad(LOADED)
    try:
        return _load(path, "cuda")
    except CannotLoad as error:
        return error


def load() -> Library:
    """The extension, loaded at the first call.

    Raises:
        CannotLoad: it is not built, or cannot be loaded.
    """
    path = find()
    library = CannotLoad(NOT_BUILT) if path is None else _loaded(path)
    if isinstance(library, CannotLoad):
        raise library
    return library


def _load(path: Path, device_type: str) -> Library:
    try:
        torch.ops.load_library(path)
        ops = getattr(torch.ops, NAMESPACE)
        library = Library(path, ops.built_for(), _of_number(ops.toolkit()), device_type)
    except (OSError, RuntimeError, AttributeError) as error:
        # torch names only the file, and the linker names it before the cause.
        raise CannotLoad(_one_line(error.__cause__ or error).removeprefix(f"{path}: ")) from error
    for name in registered():
        # Those that compute write to their arguments and return nothing.
        if getattr(ops, name).default._schema.is_mutable:
            torch.library.register_fake(f"{NAMESPACE}::{name}", _fake)
    return library


def _fake(*args: Any, **kwargs: Any) -> None:
    return None


def registered() -> list[str]:
    """The names of the ops in torch.ops.fastattn_cuda, those of the library that is loaded."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted(name for namespace, name in names if namespace == NAMESPACE)


# --- reasons --------------------------------------------------------------------------------------


@functools.cache
def driver() -> tuple[int, int]:
    """The newest CUDA that the driver supports."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return _of_number(version.value)


def _no_gpu() -> str | None:
    """The reason why torch can use no NVIDIA GPU, or None."""
    if torch.version.hip is not None:
        return "the CUDA kernels are written for NVIDIA GPUs; this torch is built for ROCm"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # says which: no driver, an old one, no GPU
    except (RuntimeError, AssertionError) as error:
        return f"torch sees no CUDA device: {_one_line(error)}"
    return "torch sees no CUDA device"


def no_code(library: Library, gpu: Capability, driver: tuple[int, int]) -> str | None:
    """The reason why a library has nothing that this GPU under this driver runs, or None.

    Code for X.Y runs on X.Z with Z >= Y; PTX is compiled by the driver, for every later GPU, if the
    driver is not older than the toolkit that wrote it. Code and PTX for an "a" architecture belong
    only to that one, those of an "f" architecture to its family (CUDA C++ Programming Guide,
    "Compute Capabilities", "Application Compatibility").
    """
    toolkit = library.toolkit
    newer_driver = (
        f"the driver supports CUDA {_version(driver)} and the extension was built with CUDA "
        f"{_version(toolkit)}: it needs a newer driver, or a build with an older toolkit"
    )
    if driver[0] < toolkit[0]:
        return newer_driver
    found = {how for entry in library.built_for.split(";") for how in _ways(entry.strip(), gpu)}
    if "code" in found:
        return None
    if "ptx" in found:
        return newer_driver if driver < toolkit else None
    return f"it has no code for compute capability {gpu}: it was built for {library.built_for}"


def _ways(entry: str, gpu: Capability) -> list[str]:
    """How a GPU can run an entry of FASTATTN_CUDA_ARCHS: "code", "ptx"."""
    arch = entry.removesuffix("+PTX")
    number = arch.rstrip("af")
    if not number.isdigit():
        return []
    built = Capability(int(number) // 10, int(number) % 10)
    same_major = gpu.major == built.major and gpu.minor >= built.minor
    if arch.endswith("a"):
        code = ptx = gpu == built
    elif arch.endswith("f"):
        code = ptx = same_major
    else:
        code, ptx = same_major, gpu >= built
    return ["code"] * code + ["ptx"] * (ptx and entry != arch)


def _of_number(version: int) -> tuple[int, int]:
    """13020 as (13, 2)."""
    return version // 1000, version % 1000 // 10


def _version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
