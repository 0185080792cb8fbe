"""Which backend runs a call, and why not the others.

An op has several *backends*, modules of its folder (`ROOMS`), all with the same entry points:
`unsupported(problem)`, which answers None or the reason why that backend cannot run that problem
(not there where it runs all), `forward`, and `backward` where it is a kernel's. The choice needs
only metadata, never the values of a tensor:

    1. the `backend=` argument of the call,
    2. `with fastattn.use_backend("torch"):`, process-wide while the block runs,
    3. the environment variable FASTATTN_BACKEND,
    4. else the first capable one in the op's order: gluon, cuda, triton, torch, reference.

A backend named by 1-3 either runs the call or raises `UnsupportedError` with the reason; it is
never replaced in silence. Only an op that does not have the backend named by 2 or 3, as
cross_entropy has no cuda, chooses by 4. Under 4 a backend may also *decline* a problem that it
could run (the Triton kernels on a CPU, a kernel that was measured to be slower than the next
backend, a Gluon or CUDA C++ kernel on a GPU that it is not written for and not measured on, or a
kernel that has not proved itself on the device, proving.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, Protocol

import torch

from fastattn import extension, measured, proving
from fastattn.extension import constant

# The module of an op's folder that is the backend, in the order in which they are tried.
ROOMS = {
    "gluon": "gluon",
    "cuda": "cuda",
    "triton": "triton",
    "torch": "aten",
    "reference": "reference",
}
NAMES = tuple(ROOMS)
# Run by the op's registered operator; the others are plain PyTorch.
KERNELS = ("gluon", "cuda", "triton")
FOR_TESTS = {  # on a CPU
    "gluon": "the Gluon kernels' emulator is for tests: name backend='gluon' to use it",
    "cuda": "the CUDA kernels' emulator is for tests: name backend='cuda' to use it",
    "triton": "Triton kernels on a CPU are for tests: name backend='triton' to use them",
}
ENVIRONMENT_VARIABLE = "FASTATTN_BACKEND"
TRITON_ON_CPU = "FASTATTN_TRITON_ON_CPU"

_used: str | None = None  # what the innermost use_backend() names


class UnsupportedError(RuntimeError):
    """A backend that the user named cannot run the call; the message says why."""


class Problem(Protocol):
    """A call apart from its data."""

    @property
    def device(self) -> torch.device: ...

    def describe(self) -> str:
        """The problem in one line, for errors and `explain`."""
        ...


@dataclass(frozen=True)
class Backend:
    """One way to run one op.

    `load` returns the module with the entry points, which is imported at the first use, so that
    `import fastattn` costs neither Triton nor a compiled extension.
    """

    name: str
    load: Callable[[], ModuleType]

    @property
    def module(self) -> ModuleType:
        return self.load()

    def unsupported(self, problem: Any) -> str | None:
        """The reason why this backend cannot run `problem`, or None if it can."""
        missing = None
        if self.name == "gluon":
            missing = gluon_unavailable(problem.device)
        elif self.name == "cuda":
            missing = extension.unavailable(problem.device)
        elif self.name == "triton":
            missing = triton_unavailable(problem.device)
        if missing or not hasattr(self.module, "unsupported"):
            return missing
        return self.module.unsupported(problem)

    def declined(self, problem: Problem, *, prove: bool = False) -> str | None:
        """The reason why the automatic choice passes this backend over although it could run.

        `prove`: let a kernel that has no verdict on this device prove itself now.
        """
        if problem.device.type == "cpu" and self.name in FOR_TESTS:
            return FOR_TESTS[self.name]
        declines = getattr(self.module, "declined", None)
        reason: str | None = None if declines is None else declines(problem)
        reason = reason or measured.declined(self.name, problem)
        return reason or proving.declined(self.name, problem, prove=prove)


_paths: list[str] = []  # of all backends of all ops


@constant
def _import_all() -> None:
    for path in _paths:
        with contextlib.suppress(ImportError):  # a platform without Triton
            importlib.import_module(path)


def _module(path: str) -> ModuleType:
    # torch.compile calls no function of a module that is a constant, and sees sys.modules as it was
    # when it looked there first.
    if torch.compiler.is_compiling():
        _import_all()
    elif path not in sys.modules:
        importlib.import_module(path)
    return sys.modules[path]


def of_op(package: str, without: tuple[str, ...] = ()) -> tuple[Backend, ...]:
    """The backends of the op whose folder is `package`, e.g. "fastattn.ops.ffn", in order.

    `without` names those that the op does not have.
    """
    paths = {name: f"{package}.{room}" for name, room in ROOMS.items() if name not in without}
    _paths.extend(paths.values())
    return tuple(Backend(name, functools.partial(_module, path)) for name, path in paths.items())


def module_of(backends: tuple[Backend, ...], name: str) -> ModuleType:
    """The module of the backend `name`."""
    return next(backend for backend in backends if backend.name == name).module


def name_of(backends: tuple[Backend, ...], module: ModuleType) -> str:
    """The name of the backend whose module this is."""
    return next(backend.name for backend in backends if backend.module is module)


@constant
def triton_runs() -> Literal["compiled", "interpreted", "executed"]:
    """The way in which Triton kernels run in this process; fixed when Triton is imported.

    "interpreted": TRITON_INTERPRET=1, Triton's interpreter runs their Python on the CPU.
    "executed": FASTATTN_TRITON_ON_CPU=1 says that Triton's active driver takes CPU tensors. It
    compiles the kernels and executes the result: the IR in our tests, which install such a driver.
    "compiled": otherwise, for a GPU.
    """

    def on(variable: str) -> bool:
        return os.environ.get(variable, "0").lower() in ("1", "true", "on", "y", "yes")

    if on("TRITON_INTERPRET"):  # Triton itself asks nothing else
        return "interpreted"
    return "executed" if on(TRITON_ON_CPU) else "compiled"


@constant
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def triton_unavailable(device: torch.device) -> str | None:
    """The reason why no Triton kernel can run on `device`, or None."""
    if not _installed("triton"):
        return "the package triton is not installed"
    if device.type == "cpu":
        if triton_runs() != "compiled":
            return None
        return "Triton compiles for GPUs; on a CPU it needs TRITON_INTERPRET=1, for tests"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device.type!r}"
    if not torch.cuda.is_available():  # a fake tensor can name a device that is not there
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs; this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


gluon_on_cpu = False  # whether an emulator is there: ops.common.gluon.use


def gluon_unavailable(device: torch.device) -> str | None:
    """The reason why no Gluon kernel can run on `device`, or None, without an import of Triton."""
    if not _installed("triton"):
        return "the package triton is not installed"
    if device.type == "cpu" and gluon_on_cpu:
        return None
    if device.type != "cuda":
        where = "a CPU" if device.type == "cpu" else repr(device.type)
        return f"the Gluon kernels run on Hopper GPUs, not on {where}"
    if not torch.cuda.is_available():  # a fake tensor can name a device that is not there
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the Gluon kernels are written for NVIDIA GPUs; this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the Gluon kernels need compute capability 9.0, this GPU has {major}.{minor}"
    return None


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return name


def named(argument: str | None) -> tuple[str, str] | None:
    """The backend that the user names and where, or None if the choice is ours.

    Raises ValueError for a name that is no backend.
    """
    if argument is not None:
        return _known(argument, "backend"), f"backend={argument!r}"
    if _used is not None:
        return _used, f"fastattn.use_backend({_used!r})"
    from_environment = _in_environment()
    if from_environment:
        _known(from_environment, f"the environment variable {ENVIRONMENT_VARIABLE}")
        return from_environment, f"{ENVIRONMENT_VARIABLE}={from_environment}"
    return None


def choice(backends: tuple[Backend, ...], argument: str | None) -> tuple[str, str] | None:
    """What `named` says, for the op that has these `backends`.

    A choice for the whole process says nothing of an op that does not have that backend.
    """
    name = named(argument)
    if name is None or argument is not None or any(b.name == name[0] for b in backends):
        return name
    return None


# The dict below os.environ, of bytes: every call looks into it, and the mapping takes 1.4 us to say
# that a variable is not set. torch.compile guards what is read from it, not what the mapping says.
_environment: Any = getattr(os.environ, "_data", None)
_KEY: Any = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def _in_environment() -> str | None:
    """The value of the environment variable, None or "" if it is not set."""
    if not torch.compiler.is_compiling():
        return os.environ.get(ENVIRONMENT_VARIABLE)
    _set_in_environment()  # before torch.compile looks at the dict
    if _environment is None:
        return os.environ.get(ENVIRONMENT_VARIABLE)
    value: bytes | str | None = _environment.get(_KEY)
    return value.decode() if isinstance(value, bytes) else value


@constant
def _set_in_environment() -> None:
    """Set the variable to "" if it is not set, for torch.compile.

    The guard of a key that is there is its value; that of one that is not is the dict's length, by
    which any new variable would compile all graphs once more.
    """
    os.environ.setdefault(ENVIRONMENT_VARIABLE, "")


def state() -> tuple[str | None, Any]:
    """The user's choice outside the call, for the key of a plan."""
    if _environment is None:
        return _used, os.environ.get(ENVIRONMENT_VARIABLE)
    return _used, _environment.get(_KEY) or None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastattn op inside the `with` block on the backend `name`.

    Process-wide, like torch.backends' switches, and nestable: the innermost block counts, and a
    call's own `backend=` argument counts more. An op that `name` cannot run raises
    `UnsupportedError`.

    Args:
        name: "gluon", "cuda", "triton", "torch" or "reference".

    Raises:
        ValueError: `name` is no backend.
    """
    global _used
    previous, _used = _used, _known(name, "name")
    try:
        yield
    finally:
        _used = previous


def select(op: str, backends: tuple[Backend, ...], problem: Any, argument: str | None) -> Backend:
    """The backend of `op` that runs `problem`, as the module's docstring says.

    Raises:
        UnsupportedError: the backend that the user names cannot run it, or none can.
    """
    chosen = choice(backends, argument)
    if chosen is None:
        for backend in backends:
            reason = backend.unsupported(problem)
            if reason is None and backend.declined(problem, prove=True) is None:
                return backend
        raise UnsupportedError(str(_explain(op, backends, problem, argument)))
    name, source = chosen
    for backend in backends:
        if backend.name == name:
            reason = backend.unsupported(problem)
            if reason is None:
                return backend
            raise refusal(op, name, problem, reason, source)
    raise UnsupportedError(f"{source}: {op} has no {name} backend")


def refusal(
    op: str, name: str, problem: Any, reason: str, source: str | None = None
) -> UnsupportedError:
    """The error for a user who names a backend that cannot run a call."""
    if source is None:
        around = named(None)
        source = f"backend={name!r}" if around is None or around[0] != name else around[1]
    return UnsupportedError(
        f"{source}: the {name} backend cannot run {op} on {problem.describe()}: {reason}. "
        f"Leave the backend open, or see fastattn.explain(fastattn.{op}, ...)."
    )


def select_backward(
    op: str, backends: tuple[Backend, ...], problem: Any, forward: str, forced: bool
) -> ModuleType:
    """The module that runs the backward of a call whose forward ran on the kernel `forward`.

    It is the same backend if that is able to, as it must be if the user named it (`forced`); else
    the first able one. A module whose kernels run forwards that they have no backward of says so
    with `backward_unsupported(problem)`; another one then follows, whoever named the forward's.
    What is named around the call of `backward` is about other calls.

    Raises:
        UnsupportedError: none can.
    """
    reasons = {}
    kernels = (backend for backend in backends if backend.name in KERNELS)
    for kernel in sorted(kernels, key=lambda kernel: kernel.name != forward):
        if kernel.name == forward or not forced:
            if (reason := kernel.unsupported(problem)) is None:
                declines = getattr(kernel.module, "backward_unsupported", None)
                if declines is None or (reason := declines(problem)) is None:
                    return kernel.module
                forced = False
            reasons[kernel.name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UnsupportedError(f"no kernel for the backward of {op} on {problem.describe()}: {told}")


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: `str()` of it is a table, `backend` the name that would run.

    Attributes:
        op: the op's name.
        problem: the call in one line.
        backend: the name of the backend that would run, None if the call would raise.
        source: who chooses: the argument, `use_backend`, the environment, or "first capable".
        reasons: for every backend in order, why it would not run; None for the one that would.
        remark: what that one copies first, None if nothing is to be told.
    """

    op: str
    problem: str
    backend: str | None
    source: str
    reasons: dict[str, str | None]
    remark: str | None = None

    def __str__(self) -> str:
        runs = self.backend or "no backend: the call would raise UnsupportedError"
        lines = [f"{self.op} on {self.problem}", f"runs on: {runs} ({self.source})"]
        width = max(map(len, self.reasons))
        for name, reason in self.reasons.items():
            told = reason or ", ".join(filter(None, ("runs", self.remark)))
            lines.append(f"  {name:<{width}}  {told}")
        return "\n".join(lines)


def _explain(
    op: str, backends: tuple[Backend, ...], problem: Any, argument: str | None
) -> Explanation:
    user = choice(backends, argument)
    present = {backend.name: backend for backend in backends}
    reasons: dict[str, str | None] = {}
    chosen: str | None = None
    for name in NAMES:
        if name not in present:
            reasons[name] = "not in this op"
            continue
        reason = present[name].unsupported(problem)
        if reason is None and user is not None and user[0] != name:
            reason = f"could, but the user names {user[0]}"
        elif reason is None and user is None:
            reason = present[name].declined(problem)
            if reason is None and chosen is not None:
                reason = f"could, but {chosen} comes first"
        reasons[name] = reason
        if reason is None:
            chosen = name
    source = "first capable" if user is None else user[1]
    return Explanation(op, problem.describe(), chosen, source, reasons)


Remark = Callable[[str, dict[str, Any]], str | None]
_explainable: dict[
    Callable[..., Any], tuple[str, Callable[..., Any], tuple[Backend, ...], Remark | None]
] = {}


def register(
    function: Callable[..., Any],
    describe: Callable[..., Any],
    backends: tuple[Backend, ...],
    remark: Remark | None = None,
) -> None:
    """Make `function` known to `explain`.

    Args:
        describe: takes the function's arguments, and returns the problem.
        remark: (backend that would run, arguments by name) -> what `explain` tells of it.
    """
    _explainable[function] = (function.__name__, describe, backends, remark)


def problem_of(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, tuple[Backend, ...]]:
    """The problem of a call of a public op, and the kernel backends that can run it, in order."""
    _, describe, backends, _ = _explainable[function]
    problem = describe(*args, **kwargs)
    kernels = (backend for backend in backends if backend.name in KERNELS)
    return problem, tuple(backend for backend in kernels if not backend.unsupported(problem))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Print which backend would run `function(*args, **kwargs)`, and why every other would not.

    Nothing is computed.

        >>> q = torch.randn(1, 8, 2, 16)
        >>> fastattn.explain(fastattn.attention, q, q, q, causal=True).backend
        attention on q (1, 8, 2, 16), k (1, 8, 2, 16), float32 on cpu, causal
        runs on: torch (first capable)
          cuda       the CUDA kernels run on NVIDIA GPUs, not on a CPU
          triton     Triton compiles for GPUs; on a CPU it needs TRITON_INTERPRET=1, for tests
          torch      runs
          reference  could, but torch comes first
        'torch'

    Args:
        function: a public op, such as `fastattn.attention`, `ffn` or `cross_entropy`.
        *args, **kwargs: the arguments of the call in question.

    Returns:
        The printed answer as data.

    Raises:
        ValueError: `function` is not an op of fastattn.
        ValueError, TypeError: what the call itself would raise for these arguments.
    """
    explanation = explanation_of(function, *args, **kwargs)
    print(explanation)
    return explanation


def explanation_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """`explain` without printing."""
    if function not in _explainable:
        known = ", ".join(sorted(name for name, *_ in _explainable.values()))
        raise ValueError(f"function must be an op of fastattn ({known}); got {function!r}")
    op, describe, backends, remark = _explainable[function]
    bound = inspect.signature(function).bind(*args, **kwargs)  # raises what the call would
    argument = kwargs.pop("backend", None)
    explanation = _explain(op, backends, describe(*args, **kwargs), argument)
    if remark is None or explanation.backend is None:
        return explanation
    return replace(explanation, remark=remark(explanation.backend, bound.arguments))
