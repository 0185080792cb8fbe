"""What the tests have run on several processes; each function gets its rank first."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from training import small

from fastattn.training.distributed.layout import DistributedConfig
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.distributed.processes import Processes


def parallel(**numbers: Any) -> Parallel:
    return Parallel(Processes("cpu"), DistributedConfig(**numbers))


def trained(
    rank: int, numbers: dict[str, Any], changes: dict[str, Any], how: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], list[tuple[float, float, int]], list[float]]:
    """The weights of a run, whole; loss, norm and tokens of each step; the validations' losses."""
    subject = small.model(**how)
    config = small.with_changes(**changes)
    history = small.trained(subject, config, parallel=parallel(**numbers))
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in subject.state_dict().items()
    }
    steps = [(step.loss, step.gradient_norm, step.tokens) for step in history.steps]
    return weights, steps, [evaluation.loss for evaluation in history.evaluations]


def config_of(numbers: dict[str, Any]) -> DistributedConfig:
    return dataclasses.replace(DistributedConfig(), **numbers)
