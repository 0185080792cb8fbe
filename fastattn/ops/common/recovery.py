"""Where a kernel cannot run a call after all, the next backend's does.

A backend is chosen from metadata. Two things show only at the launch, before anything has run: an
address or a stride of which no TMA descriptor can be made, and a kernel that does not compile or
that the chip refuses to load. Neither breaks a call that another kernel can run, unless the user
named the backend. A fault of the device, or an error of the caller, passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn import backends, proving
from fastattn.ops.common import dispatch, launch


def next_kernel(
    error: Exception,
    op_backends: tuple[backends.Backend, ...],
    failed: str,
    forced: bool,
    problem: Any,
    families: Sequence[Any],
    *,
    backward: bool = False,
) -> str:
    """The kernel backend that runs a call which `failed` could not.

    Args:
        error: what `failed` raised.
        forced: the user named `failed`.
        problem: the call.
        families: problems of all families that its kernel belongs to.
        backward: the call is that of a backward.

    Raises:
        UnsupportedError: no descriptor can be made of a tensor, and the user named `failed`.
        Exception: `error`, where it says something else, or no other kernel can run.
    """
    if launch.refused(error) is None:
        raise error
    if forced:
        if type(error) is launch.CannotRun:
            raise backends.refusal(problem.op, failed, problem, str(error)) from None
        raise error
    names = [backend.name for backend in op_backends]
    for backend in op_backends[names.index(failed) + 1 :]:
        if backend.name not in backends.KERNELS:
            break
        if backend.unsupported(problem) or proving.declined(backend.name, problem, prove=False):
            continue
        declines = getattr(backend.module, "backward_unsupported", None) if backward else None
        if declines is None or declines(problem) is None:
            dispatch.note(error, failed, families)
            return backend.name
    error.failed = failed  # type: ignore[attr-defined]  # Dispatch goes on after it
    raise error
