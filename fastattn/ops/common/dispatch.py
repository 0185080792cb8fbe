"""From a call to the backend that runs it, the same for every op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

from fastattn import backends, proving
from fastattn.ops.common import modes
from fastattn.ops.common.plans import PlanCache

Problem = TypeVar("Problem")
Run = Callable[..., Any]  # (problem, *inputs) -> the results


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
        if chosen.name in backends.KERNELS:
            forced = backends.choice(self._backends, backend) is not None
            run: Run = functools.partial(self._kernel, chosen.name, forced)
        else:
            run = chosen.module.forward
        plan = problem, run
        if key is not None and postponed == proving.postponed():
            self.plans.put(key, plan)
        return plan
