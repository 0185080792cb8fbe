"""Steps of small GPTs on a few gloo processes: their memory and messages, predicted and counted.

    python tests/scaling.py         prints the table of docs/scaling.md

Each tensor counts from its allocation to its end, whoever holds it: weights, gradients, optimiser
states, activations, FSDP2's buffers. An operator's own workspace does not.
"""

from __future__ import annotations

import collections
import contextlib
import time
import weakref
from dataclasses import dataclass
from typing import Any

import processes
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.training import TrainingConfig
from fastattn.training.contract import Batch
from fastattn.training.distributed.layout import DistributedConfig
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.distributed.planning import Numbers, Shape, Split, memory, messages
from fastattn.training.distributed.planning.shapes import LLAMA
from fastattn.training.distributed.processes import Processes
from fastattn.training.steps.optimizers import optimizers_of
from fastattn.training.steps.precision import autocast
from fastattn.training.steps.recomputation import recomputed_blocks

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": {"vocab_size": 1024, "n_positions": 256, "n_embd": 384, "n_layer": 4, "n_head": 4},
    "Llama": {
        **LLAMA, "vocab_size": 4096, "n_positions": 256, "n_embd": 192, "n_layer": 6,
        "n_head": 6, "n_kv_head": 2, "n_inner": 512,
    },
}  # fmt: skip
COLLECTIVES = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "reduce",
    "send": "pass",
}


class Counted(TorchDispatchMode):
    """Counts the bytes of all tensors that operators read and write, and those of messages.

    Attributes:
        peak: bytes at most.
        sent: bytes of the tensors of each kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.restart()

    def restart(self) -> None:
        self.peak = 0
        self.sent: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls again, with what it has here
        results = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, results)) if isinstance(t, Tensor)]
        if func.namespace == "c10d" and (kind := COLLECTIVES.get(func.overloadpacket.__name__)):
            self.sent[kind] += max(tensor.nbytes for tensor in tensors)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._there.setdefault(id(storage), weakref.ref(storage, self._forget(id(storage))))
        if self._now() > self.peak:
            # Threads of gloo hold a message's tensors a moment longer than the message takes.
            time.sleep(0.0005)
            self.peak = max(self.peak, self._now())
        return results

    def _forget(self, key: int) -> Any:
        return lambda _: self._there.pop(key, None)

    def _now(self) -> int:
        """FSDP2 frees a storage by setting its size to 0; one on the meta device has no bytes."""
        storages = [reference() for reference in list(self._there.values())]
        there = [one for one in storages if one is not None and one.device.type != "meta"]
        return sum(storage.nbytes() for storage in there)


@dataclass(frozen=True)
class Case:
    """A model of MODELS, and a step of `backwards` backwards of each process."""

    model: str
    split: Split
    length: int = 256
    backwards: int = 1
    precision: str = "float32"

    @property
    def config(self) -> fastattn.GPTConfig:
        return fastattn.GPTConfig(**MODELS[self.model], **SPECIAL)

    def predicted(self) -> tuple[float, dict[str, float]]:
        """Bytes of the memory, and of each kind of collective."""
        numbers, shape = (
            Numbers(2 if self.precision == "bfloat16" else 4, kernels=False),
            Shape(self.config),
        )
        sent: collections.Counter[str] = collections.Counter()
        for message in messages(shape, self.split, numbers, self.length, self.backwards):
            sent[message.kind] += message.size * message.times
        return memory(shape, self.split, numbers, self.length, self.backwards).total, dict(sent)

    def measured(self) -> tuple[float, dict[str, float]]:
        """The same, of a step of gloo processes; the memory of the one that has least at its peak."""
        results = processes.run(self.split.devices, step, self)
        return min(peak for peak, _ in results), results[0][1]


def step(rank: int, case: Case) -> tuple[int, dict[str, float]]:
    """Two steps of this process, of which the second, which finds states, is counted."""
    torch.manual_seed(0)
    split = case.split
    config = TrainingConfig(steps=2, accumulation=split.readers, precision=case.precision)
    model = fastattn.GPT(case.config)
    layout = DistributedConfig(split.replicate, split.shard, split.context, split.tensor)
    parallel = Parallel(Processes("cpu"), layout)
    called = parallel.placed(model, config)
    optimizers = optimizers_of(model, config)
    tokens = torch.randint(case.config.vocab_size, (split.batch, case.length + 1))
    whole = {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:], "keep_logits": False}
    count = split.batch * case.length
    batch = parallel.part(Batch(whole, counted=count, tokens=count))
    with contextlib.ExitStack() as stack:
        if split.recompute:
            stack.enter_context(recomputed_blocks(model))
        counted = stack.enter_context(Counted())
        for _ in range(2):
            counted.restart()
            for number in range(case.backwards):
                with parallel.unsynchronised(called, last=number == case.backwards - 1):
                    with autocast(torch.device("cpu"), case.precision):
                        _, loss = called(**batch.arguments)
                    loss.backward()
                    del loss
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return counted.peak, dict(counted.sent)


CASES = [
    Case("GPT-2", Split(batch=4)),
    Case("GPT-2", Split(replicate=2, batch=4)),
    Case("GPT-2", Split(replicate=2, batch=1), backwards=2),
    Case("GPT-2", Split(shard=2, batch=4)),
    Case("GPT-2", Split(shard=4, batch=4, recompute=True)),
    Case("GPT-2", Split(replicate=2, shard=2, batch=2)),
    Case("GPT-2", Split(shard=2, batch=4), precision="bfloat16"),
    Case("GPT-2", Split(shard=2, batch=4, recompute=True), precision="bfloat16"),
    Case("GPT-2", Split(replicate=2, batch=4, recompute=True), precision="bfloat16"),
    Case("Llama", Split(batch=4, recompute=True)),
    Case("Llama", Split(shard=2, batch=4)),
    Case("Llama", Split(shard=2, batch=2, recompute=True), backwards=2),
    Case("Llama", Split(shard=4, batch=4)),
    Case("Llama", Split(tensor=2, batch=4)),
    Case("Llama", Split(shard=2, tensor=2, batch=4, recompute=True)),
    Case("Llama", Split(context=2, batch=4)),
    Case("Llama", Split(shard=2, context=2, batch=2, recompute=True)),
]


HEADER = "| model | products | replicate x shard x context x tensor | batch x backwards | checkpointing | "
HEADER += "memory | counted | ratio | sent | counted |\n|" + "---|" * 10


def described(case: Case) -> str:
    """The first cells of its row."""
    *sizes, batch, recompute = case.split
    split = " x ".join(map(str, sizes))
    often = "yes" if recompute else "no"
    return f"| {case.model} | {case.precision} | {split} | {batch} x {case.backwards} | {often} |"


def row(case: Case) -> str:
    """Predicted and counted, in 10^6 bytes; sent are the sizes of all messages' tensors."""
    (total, sent), (counted, really) = case.predicted(), case.measured()
    messages_, theirs = sum(sent.values()), sum(really.values())
    return (
        f"{described(case)} {total / 1e6:.1f} MB | {counted / 1e6:.1f} MB | {total / counted:.2f} | "
        f"{messages_ / 1e6:.1f} MB | {theirs / 1e6:.1f} MB |"
    )


if __name__ == "__main__":
    print(HEADER)
    for case in CASES:
        print(row(case), flush=True)
