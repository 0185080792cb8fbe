"""Bytes that a call holds, and that a forward keeps for its backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages are of levels 0 to 5


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that one call holds beyond what is held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def saved_bytes(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """The storages that `forward` keeps for its backward, each once, without those of `given`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # held until all are counted, so that no address comes twice
    there = {tensor.untyped_storage().data_ptr() for tensor in given}
    del out
    return sum(size for address, size in kept.items() if address not in there)
