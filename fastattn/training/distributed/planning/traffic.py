"""The messages of a step, and the time that a step takes, by a stated model.

A message of B bytes among P processes: a gather or a scatter lets each send B (P - 1) / P bytes, a
reduction (all-reduce) twice that, one of a ring's P - 1 passes B. All go around rings, as NCCL's:

    seconds = sent / bandwidth + steps inside machines x 3.4 us + steps between them x 14 us

The latencies are NCCL's own (src/graph/tuning.cc: Ring, Simple; NVLink and network); a reduction
goes through a tree where that has the smaller latency, as there. A group inside a machine has
NVLink's bandwidth. Another has that of its members' network cards in a machine, at most NVLink's:
each of its rings leaves by another card.

A step's time is that of its products at a share of the peak, and of what does not overlap:

    tensor      its reductions wait for products, and products for them
    context     a ring's passes overlap with the attention of the keys that are there
    FSDP2       gathers and scatters overlap with the rest of the forward and of the backward, but
                for the first gather of the embeddings, and the last scatter
    replicate   the reduction: DDP's overlaps with the last backward, FSDP2's with each

Not in it: the input, the optimiser (milliseconds), waiting for slower processes, bubbles of small
products. A real step is slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from fastattn.chips import Device
from fastattn.training.distributed.planning.memory import FLOAT32, Numbers, Split
from fastattn.training.distributed.planning.shapes import Shape

LATENCY_INSIDE, LATENCY_OUTSIDE = 3.4e-6, 14e-6  # seconds a step of a ring
TREE_INSIDE, TREE_OUTSIDE = 4e-6, 14e-6
BUCKET = 25 * 2**20  # bytes of a reduction of DDP, torch's bucket_cap_mb


class Message(NamedTuple):
    """Messages of one kind in a step.

    Attributes:
        cause: "tensor", "context", "weights" (FSDP2) or "replicate".
        kind: "gather", "scatter", "reduce" or "pass".
        backward: whether in the backward.
        size: bytes of the whole tensor.
        times: how many there are in a step.
        processes: of their group.
        stride: between the ranks of the group.
    """

    cause: str
    kind: str
    backward: bool
    size: float
    times: float
    processes: int
    stride: int

    @property
    def sent(self) -> float:
        """Bytes that a process sends."""
        share = (self.processes - 1) / self.processes
        return self.times * self.size * {"reduce": 2 * share, "pass": 1.0}.get(self.kind, share)

    def seconds(self, device: Device, efficiency: float) -> float:
        """All of them, at a share `efficiency` of the links' bandwidth."""
        together = min(self.processes, max(1, device.machine // self.stride))
        machines = -(-self.processes // together)
        bandwidth = device.inside
        if machines > 1:
            bandwidth = min(bandwidth, together * device.outside)
        return self.sent / (bandwidth * efficiency) + self.times * self._latency(machines, together)

    def _latency(self, machines: int, together: int) -> float:
        """Of one message, among `together` processes in each machine."""
        if self.kind == "pass":
            return LATENCY_OUTSIDE if machines > 1 else LATENCY_INSIDE
        outside = machines - 1
        ring = (self.processes - 1 - outside) * LATENCY_INSIDE + outside * LATENCY_OUTSIDE
        if self.kind != "reduce":
            return ring
        tree = (together - 1) * TREE_INSIDE + math.log2(machines) * TREE_OUTSIDE
        return 2 * min(ring, tree)


def messages(
    shape: Shape, split: Split, numbers: Numbers, length: int, backwards: int
) -> Iterator[Message]:
    """All messages of a step of so many backwards, each of `split.batch` sequences."""
    config, product, layers = shape.config, numbers.product, shape.config.n_layer
    replicate, _, context, tensor = split[:4]
    block, rest = shape.block.of_rank(tensor), shape.rest.of_rank(tensor)
    tokens = split.batch * length / context
    if tensor > 1:
        # Two a block and way, and one where a block is computed again, up to what the backward
        # needs; embedding and head.
        size, again = tokens * config.n_embd * product, 1 if split.recompute else 0
        for backward, times in ((False, 2 * layers + 1), (True, (2 + again) * layers + 1)):
            yield Message("tensor", "reduce", backward, size, times * backwards, tensor, 1)
        # Of the loss the largest score of a row, the sum of exponentials, the target's score.
        yield Message("tensor", "reduce", False, 3 * tokens * FLOAT32, backwards, tensor, 1)
    if context > 1:
        keys = 2 * tokens * shape.key_width / tensor
        passes = (context - 1) * layers * backwards
        yield Message("context", "pass", False, keys * product, passes, context, tensor)
        again = 2 if split.recompute else 1
        yield Message("context", "pass", True, keys * product, again * passes, context, tensor)
        gradients = context * layers * backwards  # once more, home
        yield Message("context", "pass", True, keys * FLOAT32, gradients, context, tensor)
    if not split.sharded:
        copies = replicate * context
        if copies > 1:
            size = FLOAT32 * (layers * block + rest)
            buckets = math.ceil(size / BUCKET)
            yield Message("replicate", "reduce", True, size / buckets, buckets, copies, 1)
        return
    parts = split.parts
    for size, times in ((block, layers * backwards), (rest, backwards)):
        if parts > 1:
            yield Message("weights", "gather", False, product * size, times, parts, tensor)
            yield Message("weights", "gather", True, product * size, times, parts, tensor)
            yield Message("weights", "scatter", True, FLOAT32 * size, times, parts, tensor)
        if replicate > 1:
            part, stride = FLOAT32 * size / parts, parts * tensor
            yield Message("replicate", "reduce", True, part, times, replicate, stride)


class Seconds(NamedTuple):
    """The time of a step, and of each cause, most of which overlap."""

    step: float
    products: float
    tensor: float
    context: float
    weights: float
    replicate: float


def seconds(
    shape: Shape,
    split: Split,
    numbers: Numbers,
    length: int,
    backwards: int,
    device: Device,
    speed: float,
    links: float,
) -> Seconds:
    """The time of a step.

    Args:
        speed: operations a second that products reach on a device.
        links: share of their bandwidth that messages reach.
    """
    tokens = backwards * split.batch * length / (split.context * split.tensor)
    forward = tokens * shape.flops(length) / 3 / speed
    attention = tokens * 4 * shape.config.n_layer * shape.query_width * length / speed
    spent: dict[tuple[str, bool], float] = {}
    largest = 0.0  # gather or scatter of the rest, which nothing overlaps
    for message in messages(shape, split, numbers, length, backwards):
        key, time = (message.cause, message.backward), message.seconds(device, links)
        spent[key] = spent.get(key, 0.0) + time
        if message.cause == "weights" and message.times == backwards:
            largest = max(largest, time / backwards)

    step = largest
    for backward in (False, True):
        rounds = 1 if not backward else 3 if split.recompute else 2
        ring = max(0.0, spent.get(("context", backward), 0.0) - rounds * attention)
        own = rounds * forward + spent.get(("tensor", backward), 0.0) + ring
        others = spent.get(("weights", backward), 0.0)
        reduction = spent.get(("replicate", backward), 0.0)
        if split.sharded:
            step += max(own, others + reduction)
        else:  # only the last backward is there to overlap with
            step += own + max(0.0, reduction - own / backwards)
    causes = ("tensor", "context", "weights", "replicate")
    total = (spent.get((cause, False), 0.0) + spent.get((cause, True), 0.0) for cause in causes)
    return Seconds(step, forward * (4 if split.recompute else 3), *total)
