"""Functions that the tests run on several processes; each gets its rank first."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from training import small

from fastattn.ops.cross_entropy import IGNORED
from fastattn.training import Windows, loop
from fastattn.training.contract import Batch
from fastattn.training.distributed import agreement
from fastattn.training.distributed.layout import DistributedConfig
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.distributed.processes import Processes
from fastattn.training.distributed.share import Share
from fastattn.training.distributed.tensor import canonical
from fastattn.training.history import History
from fastattn.training.steps.gradients import local
from fastattn.training.steps.precision import loss_scaler
from fastattn.training.steps.state import TrainingState

Steps = list[tuple[float, float, int]]


def parallel(**numbers: Any) -> Parallel:
    return Parallel(Processes("cpu"), DistributedConfig(**numbers))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Holed(Windows):
    """Windows of which each of a step has fewer targets that count, all in its first part."""

    def batch(self, index: int) -> Batch:
        batch = super().batch(index)
        targets = batch.arguments["targets"].clone()
        targets[:, targets.shape[1] - 3 * index :] = IGNORED
        arguments = {**batch.arguments, "targets": targets}
        return dataclasses.replace(batch, arguments=arguments, counted=int((targets >= 0).sum()))


def gradients(
    rank: int, numbers: dict[str, Any], changes: dict[str, Any], how: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a run's first step, and its gradients, whole and not clipped."""
    subject = small.model(**how)
    config = small.with_changes(max_gradient_norm=float("inf"), **changes)
    layout = parallel(**numbers)
    called = layout.placed(subject, config)
    scaler = loss_scaler(torch.device("cpu"), "float32")
    state = TrainingState(subject, [], None, scaler, History())
    share = Share.of(1, Holed(small.STREAM, config.batch_size, config.context), config, layout)
    loss, _ = loop._gradients(state, called, small.OBJECTIVE, share, config, layout)
    found = {name: p.grad for name, p in subject.named_parameters()}
    return loss, {
        name: whole(canonical(subject, name, grad))
        for name, grad in found.items()
        if grad is not None
    }


def trained(
    rank: int, numbers: dict[str, Any], changes: dict[str, Any], how: dict[str, Any]
) -> tuple[dict[str, Tensor], Steps, list[float]]:
    """The weights of a run, whole; loss, norm and tokens of each step; the validations' losses."""
    subject = small.model(**how)
    history = small.trained(subject, small.with_changes(**changes), parallel=parallel(**numbers))
    steps = [(step.loss, step.gradient_norm, step.tokens) for step in history.steps]
    weights = {
        name: whole(canonical(subject, name, value)) for name, value in subject.state_dict().items()
    }
    return weights, steps, [evaluation.loss for evaluation in history.evaluations]


def evaluated(
    rank: int, numbers: dict[str, Any], length: int, tokens: int
) -> tuple[dict[str, float], int]:
    """The measures of a validation on so many tokens, and how often this process ran the model."""
    subject, layout = small.model(), parallel(**numbers)
    config = small.with_changes(evaluation_tokens=tokens)
    layout.placed(subject, config)
    calls: list[int] = []
    subject.register_forward_hook(lambda *_: calls.append(1))
    data = small.windows(small.HELD_OUT[:length], config)
    device = torch.device("cpu")
    return loop.evaluate(subject, small.OBJECTIVE, data, config, device, layout), len(calls)


def differing(rank: int, numbers: dict[str, Any], what: str) -> str:
    """What a run says of which rank 1 has another seed, another config, or a weight that has lost
    a bit after two steps."""
    odd = rank == 1
    subject = small.model(seed=int(odd and what == "seed"))
    config = small.with_changes(steps=3, accumulation=2, seed=int(odd and what == "config"))
    layout = parallel(**numbers)

    def damage(history: History) -> None:
        if odd and what == "weight" and len(history.steps) == 2:
            bits = local(subject.blocks[1].attention.out_proj.weight).detach().view(torch.int32)
            bits[3, 5] ^= 1

    try:
        small.trained(subject, config, parallel=layout, on_progress=damage)
    except ValueError as error:
        return str(error)
    tensors = TrainingState.weights_of(subject)
    try:
        agreement.check_tensors(layout.processes, tensors, "after step 3")
    except ValueError as error:
        return str(error)
    return "nothing"


def dying(rank: int) -> str:
    """What rank 0 says when rank 1 dies in a step."""

    def die(history: History) -> None:
        if rank == 1 and len(history.steps) == 2:
            os._exit(1)

    config = small.with_changes(accumulation=2)
    small.trained(small.model(), config, parallel=parallel(replicate=2), on_progress=die)
    return "nothing"


def refused(rank: int, cases: list[tuple[dict[str, Any], dict[str, Any], str]]) -> list[str]:
    """What is said of each case: the numbers of processes, changes of the config, the objective."""
    said = []
    for numbers, changes, name in cases:
        objective = copy.copy(small.OBJECTIVE)
        objective.name = name
        try:
            parallel(**numbers).check(
                small.with_changes(**{"accumulation": 2, **changes}), objective
            )
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def together(rank: int) -> list[str]:
    """What processes say of work that fails on rank 1, and of work that rank 0 does first."""
    processes = Processes("cpu")

    def work() -> int:
        if rank == 1:
            raise ValueError("the disk is full")
        return rank

    said = []
    for way in (processes.together, processes.lead_first):
        try:
            way(work)
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    made: list[int] = processes.lead_first(lambda: _made(rank))
    return [*said, str(made)]


def _made(rank: int) -> list[int]:
    """The ranks that have come here, this one the last."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return list(range(store.add("came", 1))) if rank == 0 else [store.add("came", 1)]
