"""From a call to the backend that runs it, the same for every op."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch

from fastattn import backends, proving
from fastattn.ops.common import launch, modes
from fastattn.ops.common.plans import PlanCache

Problem = TypeVar("Problem")
Run = Callable[..., Any]  # (problem, *inputs) -> the results


_all: weakref.WeakSet[Dispatch[Any]] = weakref.WeakSet()


def forget() -> None:
    """Drop the plans of all ops: a kernel that they may have chosen turned out to fail."""
    for dispatch in _all:
        dispatch.plans.clear()


def note(error: Exception, backend: str, problems: Sequence[Any]) -> None:
    """Make known that a launch of `backend` was refused, and that another backend runs the call.

    Args:
        problems: of all families that the kernel belongs to, one at least.
    """
    if type(error) is launch.CannotRun:  # `explain` says it
        return
    new = None
    if launch.refused(error) == launch.KERNEL:
        new = proving.fail(backend, problems, error)
        if new:
            forget()
    if new is None:
        warnings.warn(
            f"fastattn: the {backend} backend of {problems[0].op} could not run "
            f"{problems[0].describe()}, and another one does: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


class Dispatch(Generic[Problem]):
    """The plans of an op: the problem that a call is, and what runs it.

    key, plan = dispatch.find(tensors, *the_other_arguments, backend)
    if plan is None:
        plan = dispatch.make(key, describe(...), backend)
    problem, run = plan
    return run(problem, *tensors)
    """

    def __init__(self, op_backends: tuple[backends.Backend, ...], kernel: Run) -> None:
        """
        Args:
            op_backends: the op's, in order.
            kernel: (name, forced, problem, *inputs) -> the results, of a kernel backend, by the
                registered operator. The `forward` of the others is called itself.
        """
        self.plans: PlanCache[tuple[Problem, Run]] = PlanCache()
        self._backends = op_backends
        self._kernel = kernel
        _all.add(self)

    def find(
        self, tensors: tuple[torch.Tensor | None, ...], *settings: Hashable
    ) -> tuple[Hashable, tuple[Problem, Run] | None]:
        """(key, plan) of a call: the plan is None where there is none yet.

        The key has all that a plan may depend on: metadata of the tensors, the other arguments, and
        the modes of torch and of the user's choice of a backend. It is None where no plan is kept:
        while calls are recorded, where no choice may depend on a size, and where an argument is no
        plain tensor.
        """
        if modes.recorded():
            return None, None
        try:
            metadata = [
                None if x is None else (x.shape, x.dtype, x.device, x.layout, x.requires_grad)
                for x in tensors
            ]
            autocast = modes.autocast_dtype(tensors[0].device.type)  # type: ignore[union-attr]
            key = (
                *metadata, settings, backends.state(), torch.is_grad_enabled(), autocast,
                modes.transformed(),
            )  # fmt: skip
            return key, self.plans.get(key)
        except (AttributeError, RuntimeError, TypeError):  # no tensor, nested, or of symbolic size
            return None, None

    def make(
        self, key: Hashable, problem: Problem, backend: str | None, op: str | None = None
    ) -> tuple[Problem, Run]:
        """Choose who runs `problem`, and keep that under `key` unless it is None.

        Args:
            backend: the argument of the call.
            op: the name of the public function, if it is not the problem's `op`.

        Raises:
            fastattn.UnsupportedError: the backend that the user names cannot run it, or none can.
        """
        name = op or problem.op  # type: ignore[attr-defined]
        postponed = proving.postponed()
        chosen = backends.select(name, self._backends, problem, backend)
        forced = backends.choice(self._backends, backend) is not None
        plan = problem, self._runner(chosen, forced)
        if key is not None and postponed == proving.postponed():
            self.plans.put(key, plan)
        return plan

    def _runner(self, backend: backends.Backend, forced: bool) -> Run:
        if backend.name not in backends.KERNELS:
            run: Run = backend.module.forward
            return run
        if torch.compiler.is_compiling():  # a graph cannot break inside of a `try`
            return functools.partial(self._kernel, backend.name, forced)
        return functools.partial(self._run, backend, forced)

    def _run(self, backend: backends.Backend, forced: bool, problem: Problem, *inputs: Any) -> Any:
        """Run a call on a kernel backend, or on the next one if its launch is refused."""
        try:
            return self._kernel(backend.name, forced, problem, *inputs)
        except Exception as error:
            failed = getattr(error, "failed", backend.name)  # the operator may have tried others
            other = None
            if not forced and launch.refused(error) is not None:
                other = self._after(failed, problem)
            if other is None:
                raise
            note(error, failed, [problem])
        return self._runner(other, forced)(problem, *inputs)

    def _after(self, failed: str, problem: Problem) -> backends.Backend | None:
        """The next one that can run `problem`, however fast."""
        names = [backend.name for backend in self._backends]
        for other in self._backends[names.index(failed) + 1 :]:
            reason = other.unsupported(problem)
            if not (reason or proving.declined(other.name, problem, prove=False)):
                return other
        return None
