"""Whether all processes of a run have the same settings and the same weights.

A rank that was started with another config, drew from another seed, or whose memory was damaged
would go on without an error, and its gradients would spoil the others' weights.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastattn.training.distributed.processes import Processes
from fastattn.training.fingerprints import as_json, difference
from fastattn.training.steps.gradients import local


def check_settings(processes: Processes, settings: Mapping[str, Any]) -> None:
    """Check that `settings`, which must be JSON, are the same on all processes.

    Raises:
        ValueError: on all of them; the message has the ranks that differ, and one key.
    """
    if processes.count == 1:
        return
    everybodys = processes.gathered(as_json(settings))
    lead = everybodys[0]
    others = {rank: difference(lead, own) for rank, own in enumerate(everybodys) if own != lead}
    if others:
        rank, words = next(iter(others.items()))
        raise ValueError(
            f"rank {_listed(others)} of {processes.count} runs with other settings than rank 0: "
            f"{words}, there being rank 0 and here rank {rank}. Start all with one config"
        )


def check_tensors(processes: Processes, tensors: Mapping[str, Tensor], when: str) -> None:
    """Check that the processes which hold the same part of a tensor hold the same bits.

    The bits are compared by `torch.hash_tensor`, their exclusive or: one that flipped is found.

    Args:
        when: for the message: "at the start".

    Raises:
        ValueError: on all processes; the message has the ranks that differ, and a tensor's name.
    """
    if processes.count > 1:
        own = {name: (_part(tensor), digest(tensor)) for name, tensor in tensors.items()}
        _check(processes, own, when)


def check_digests(processes: Processes, digests: Mapping[str, int], when: str) -> None:
    """`check_tensors` of whole tensors, of which the digests are left."""
    if processes.count > 1:
        _check(processes, {name: ((), number) for name, number in digests.items()}, when)


def _check(processes: Processes, own: dict[str, tuple[Any, int]], when: str) -> None:
    """Compare (part, digest) of each tensor among the processes that have the same part."""
    everybodys = processes.gathered(own)
    wrong: dict[int, str] = {}
    for name in own:
        parts: dict[Any, dict[int, int]] = collections.defaultdict(dict)
        for rank, theirs in enumerate(everybodys):
            if name not in theirs:
                wrong.setdefault(rank, name)
                continue
            part, number = theirs[name]
            parts[part][rank] = number
        for digests in parts.values():
            # Most are right; of two, the lower rank.
            usual = collections.Counter(digests.values()).most_common(1)[0][0]
            for rank, number in digests.items():
                if number != usual:
                    wrong.setdefault(rank, name)
    if wrong:
        raise ValueError(
            f"rank {_listed(wrong)} of {processes.count} has other weights {when} than the ranks "
            f"that should have the same, first in {next(iter(wrong.values()))}: another seed or "
            "model folder, or damaged memory. The last checkpoint is from before it"
        )


def _part(tensor: Tensor) -> tuple[Any, ...]:
    """Which part of the whole this process has: equal on those that must have equal bits."""
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(
        where
        for where, placement in zip(coordinate, tensor.placements)
        if not placement.is_replicate()
    )


def digest(tensor: Tensor) -> int:
    """The exclusive or of this process's bits of a tensor."""
    own = local(tensor.detach())
    return int(torch.hash_tensor(own).view(torch.int64)) if own.numel() else 0


def _listed(ranks: Mapping[int, object]) -> str:
    return ", ".join(map(str, ranks))
