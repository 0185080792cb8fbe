"""Proofs: a kernel runs a small problem against float64 before it is chosen on a device.

A kernel that is right on one GPU may be wrong on another, by its compiler, its driver, or because
nobody has run it there. So the automatic choice asks here. The first call of a *family* (an op, a
backend, and all features that select a kernel) runs a small problem of its kind and compares its
results and gradients with the plain formula in float64, by the numeric rule (rule.py). The verdict
is remembered in the user's cache folder for this device, driver, torch, compiler and state of the
kernels. A family that fails is never chosen there, and a warning says so once a process.

Backends of `FIRST_PROVED` are not chosen before they pass. The Triton kernels are, and stay out
only where a proof failed, which `fastattn doctor --prove` runs for all kernels at once. Nobody asks
where the user names the backend, nor for a backward that follows a kernel's forward.

No proof runs while calls are recorded, while a CUDA graph is captured or under a dispatch mode of
torch, nor while another thread or process proves something. Such a call goes to another backend,
and a later one asks again. A process that ends in a proof, because the device fails, leaves a
family that failed, and so does a later call whose kernel cannot be compiled or loaded (`fail`).
FASTATTN_PROVE=0 runs no proof at all; what is remembered counts.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn import measured, rule, verdicts
from fastattn.extension import constant
from fastattn.verdicts import Subject, Verdict

VARIABLE = "FASTATTN_PROVE"
FIRST_PROVED = ("gluon", "cuda")  # not chosen before they pass: nobody has run them on a GPU
PROVED = (*FIRST_PROVED, "triton")
AGAIN = "`fastattn doctor --prove` proves it again"
RIGHT = Verdict(True, "")
FEW = 64  # results of fewer elements are compared together: their largest error is chance


class Proof(NamedTuple):
    """How an op proves its kernels.

    Attributes:
        family: problem -> all of it that selects a kernel, in words, or None: there is no proof of
            such a call.
        inputs: (problem, draw) -> the arguments of a small problem of its kind by name;
            draw(*shape) is a normal tensor in its dtype. Those that require gradients are
            differentiated.
        kernel: (problem, inputs, backend) -> the results by name, from that backend.
        formula: (problem, inputs) -> the same in plain PyTorch, in the dtype of the inputs.
    """

    family: Callable[[Any], str | None]
    inputs: Callable[[Any, Callable[..., torch.Tensor]], dict[str, Any]]
    kernel: Callable[[Any, dict[str, Any], str], dict[str, torch.Tensor]]
    formula: Callable[[Any, dict[str, Any]], dict[str, torch.Tensor]]


_proofs: dict[str, Proof] = {}
_known: dict[Subject, Verdict | None] = {}  # of this process, None where the disk has none
_warned: set[Subject] = set()
_lock = threading.Lock()
_postponed = 0


def register(op: str, proof: Proof) -> None:
    """Let `proof` be that of the problems whose `op` is this."""
    _proofs[op] = proof


def postponed() -> int:
    """How often a proof had to wait for a later call; a choice made meanwhile is not to be kept."""
    return _postponed


def subject(backend: str, problem: Any) -> Subject | None:
    """The family of a problem on a backend, None where there is no proof of it."""
    proof = _proofs.get(problem.op)
    family = None if proof is None else proof.family(problem)
    return None if family is None else Subject(problem.op, backend, family, problem.device)


def declined(backend: str, problem: Any, *, prove: bool) -> str | None:
    """The reason why the automatic choice passes `backend` over, or None if it may run.

    Args:
        prove: run the proof if there is no verdict yet; else only what is remembered counts.
    """
    if backend not in PROVED:
        return None
    about = subject(backend, problem)
    first = backend in FIRST_PROVED
    if about is None:
        if not first or measured.found(backend, problem):
            return None
        return f"no proof of such a call: name backend={backend!r} to use it"
    if torch.compiler.is_compiling():
        return _traced(*about, first)
    verdict = remembered(about)
    where = _name(about.device)
    if verdict is None and first:
        if not enabled():
            return f"not proven on {where}, and {VARIABLE}=0"
        if not prove:
            return f"not proven on {where}: the first call proves it, or `fastattn doctor --prove`"
        if (reason := impossible(about.device)) is None:
            verdict = prove_now(about, problem)
            reason = "another thread or process is proving now, or memory is short"
        if verdict is None:
            global _postponed
            _postponed += 1
            return f"not proven on {where}, and {reason}"
    if verdict is None or verdict.passed:
        return None
    told = f"its proof failed on {where}: {verdict.told}; {AGAIN}"
    if prove and about not in _warned:
        _warned.add(about)
        warnings.warn(
            f"fastattn: the {backend} backend of {about.op} is not used for {about.family}: {told}",
            RuntimeWarning,
            stacklevel=2,
        )
    return told


@constant
def _traced(op: str, backend: str, family: str, device: torch.device, first: bool) -> str | None:
    """`declined` for torch.compile, which takes the answer as a constant."""
    verdict = remembered(Subject(op, backend, family, device))
    where = _name(device)
    if verdict is None and first:
        return (
            f"not proven on {where}, and no proof runs while torch.compile traces: call it once "
            "before, or run `fastattn doctor --prove`"
        )
    if verdict is None or verdict.passed:
        return None
    return f"its proof failed on {where}: {verdict.told}; {AGAIN}"


def _name(device: torch.device) -> str:
    return next(iter(measured.devices(device)), str(device))


def enabled() -> bool:
    """Whether proofs may run: FASTATTN_PROVE is not 0."""
    return os.environ.get(VARIABLE, "1").lower() not in ("0", "false", "off", "no")


def impossible(device: torch.device) -> str | None:
    """The reason why no proof can run at this moment, or None."""
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return "no proof runs while calls are recorded or watched by a mode of torch"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "no proof runs while a CUDA graph is captured: call it once before"
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:  # after a fault every call raises
        return "the device fails, maybe since an earlier proof: start the process again"
    return None


def remembered(about: Subject) -> Verdict | None:
    """The verdict of this process or of an earlier one, None if there is none."""
    if about not in _known:
        stands, told = verdicts.read(verdicts.path_of(about)) or (verdicts.RUNNING, "")
        _known[about] = (
            None if stands == verdicts.RUNNING else Verdict(stands == verdicts.PASSED, told)
        )
    return _known[about]


# --- running --------------------------------------------------------------------------------------


def prove_now(about: Subject, problem: Any, *, again: bool = False) -> Verdict | None:
    """Prove a family and remember the verdict; None if another thread or process is at it.

    Args:
        problem: one of the family.
        again: whatever is remembered.
    """
    if not _lock.acquire(blocking=False):
        return None
    try:
        path = verdicts.path_of(about)
        with verdicts.locked(path) as held:
            if not held:
                return None
            verdict = None if again else verdicts.left(path)
            if verdict is None:
                verdict = _marked(path, about, problem)
            if verdict is not None:
                _known[about] = verdict
            return verdict
    finally:
        _lock.release()


def _marked(path: Path | None, about: Subject, problem: Any) -> Verdict | None:
    """Run the proof between two notes on the disk; None if the device has no memory left."""
    verdicts.write(path, about, verdicts.RUNNING, "")
    verdict = None
    try:
        start = time.perf_counter()
        told = _compared(about, problem)
        verdict = Verdict(told[0], f"{told[1]} ({1e3 * (time.perf_counter() - start):.0f} ms)")
    except torch.OutOfMemoryError:
        pass
    except Exception as error:
        verdict = Verdict(False, _named(error))
    finally:
        if verdict is not None:
            verdicts.write(
                path, about, verdicts.PASSED if verdict.passed else verdicts.FAILED, verdict.told
            )
        elif path is not None:  # Ctrl-C says nothing about the kernel
            path.unlink(missing_ok=True)
    return verdict


def _named(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def fail(backend: str, problems: Iterable[Any], error: Exception) -> bool | None:
    """Note that the families of `problems` fail, as a kernel of theirs cannot be launched; warn.

    Returns whether any of them counted as right before; None if there is no such family.
    """
    told = f"in a later call, {_named(error)}"
    families = {about for x in problems if (about := subject(backend, x)) is not None}
    news = [about for about in families if (remembered(about) or RIGHT).passed]
    for about in news:
        verdicts.write(verdicts.path_of(about), about, verdicts.FAILED, told)
        _known[about] = Verdict(False, told)
        _warned.add(about)
    if news:
        warnings.warn(
            f"fastattn: the {backend} backend of {news[0].op} is no longer used for "
            f"{news[0].family}: {told}; {AGAIN}",
            RuntimeWarning,
            stacklevel=2,
        )
    return bool(news) if families else None


def _compared(about: Subject, problem: Any) -> tuple[bool, str]:
    """Whether the kernel holds the rule, and the figures of its worst result."""
    proof, device = _proofs[about.op], about.device
    generator = torch.Generator(device).manual_seed(0)  # the user's own one does not move

    def draw(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    with _modes(device):
        inputs = proof.inputs(problem, draw)
        ours = _results(lambda given: proof.kernel(problem, given, about.backend), inputs)
        eager, exact = (
            _results(lambda given: proof.formula(problem, given), _cast(inputs, dtype))
            for dtype in (problem.dtype, torch.float64)
        )
        return _judged(ours, eager, exact, problem.dtype)


def _results(
    run: Callable[[dict[str, Any]], dict[str, torch.Tensor]], inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What `run` returns and the gradients of the inputs that require them, by name."""
    given = {
        name: x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }
    found = run(given)
    leaves = {
        name: x for name, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad
    }
    if leaves:
        generator = torch.Generator().manual_seed(1)
        # Of so few bits that they are the same in every dtype.
        directions = [
            torch.randn(x.shape, generator=generator, device="cpu").bfloat16()
            for x in found.values()
        ]
        # The LSE of a query without a key is constant.
        cotangents = [
            torch.where(x.detach().isfinite(), direction.to(x), 0.0)
            for x, direction in zip(found.values(), directions)
        ]
        grads = torch.autograd.grad(list(found.values()), list(leaves.values()), cotangents)
        found = found | {f"d{name}": grad for name, grad in zip(leaves, grads)}
    return {name: x.detach() for name, x in found.items()}


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with all floating-point tensors in one dtype."""
    return {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


def _judged(
    ours: dict[str, torch.Tensor],
    eager: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> tuple[bool, str]:
    """Compare each result, those of few elements joined."""
    triples = {}
    for name, x in ours.items():
        plain = eager[name]
        if name[0] == "d":
            # A float32 parameter's gradient is made of the call's 16-bit tensors, and held to
            # theirs; that of a 16-bit parameter of a float32 call is rounded.
            coarse = min(x.dtype, dtype, key=lambda kind: kind.itemsize)
            x, plain = x.to(coarse), plain.to(coarse)
        triples[name] = x, plain, exact[name]
    few = [name for name, (x, _, _) in triples.items() if x.numel() < FEW and x.dtype == dtype]
    if few:
        columns = zip(*(triples.pop(name) for name in few))
        triples[", ".join(few)] = tuple(  # type: ignore[assignment]
            torch.cat([x.flatten() for x in column]) for column in columns
        )
    told, worst = "", -1.0
    for name, triple in triples.items():
        in_another_order = 1 if triple[0].dtype.itemsize == 2 else 16  # of sums
        terms = max(float(x.abs().nan_to_num(posinf=0.0).max()) for x in exact.values())
        found = rule.compare(*triple, ulps=in_another_order * rule.ULPS, terms=terms)
        if found.violation is not None:
            return False, f"{name}: {found.violation}"
        if (ratio := found.max / max(found.eager_max, 1e-30)) > worst:
            worst = ratio
            told = f"{name}: max error {found.max:.2e}, plain PyTorch's {found.eager_max:.2e}"
    return True, told


@contextlib.contextmanager
def _modes(device: torch.device) -> Iterator[None]:
    """Torch's modes as they are at the start of a program, on `device`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # A caller's, such as activation checkpointing's, count the tensors of its graph.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
