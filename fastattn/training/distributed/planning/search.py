"""Every split of a step over devices, and which of those that fit is the fastest."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastattn.chips import DEVICES, peak_flops
from fastattn.nn.checks import check_integer, check_within
from fastattn.training.distributed.layout import DIMENSIONS, DistributedConfig
from fastattn.training.distributed.planning.memory import Memory, Numbers, Split, memory
from fastattn.training.distributed.planning.shapes import Shape
from fastattn.training.distributed.planning.traffic import Seconds, messages, seconds

TIE = 1.01  # times within a percent are one time: the model is coarser
MOST_DEVICES = 1 << 17
LARGEST_BATCH = 64  # sequences of a backward


@dataclass(frozen=True)
class Job:
    """A step to plan, and the devices for it.

    Attributes:
        shape: of the model.
        devices: how many there are.
        chip: their name in `chips.DEVICES`.
        length: tokens of a sequence.
        sequences: of a step, on all devices together.
        numbers: the formats; products in bfloat16.
        efficiency: share of the chip's peak that products reach.
        links: share of the bandwidth that messages reach.
        usable: share of a device's memory that tensors may take.
        fixed: numbers of the split that are given: "replicate", "shard", "context", "tensor".

    Raises:
        TypeError, ValueError: a value is out of range; the message names it.
    """

    shape: Shape
    devices: int
    chip: str = "H100"
    length: int = 4096
    sequences: int = 1024
    numbers: Numbers = field(default_factory=Numbers)
    efficiency: float = 0.5
    links: float = 0.8
    usable: float = 0.9
    fixed: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("devices", "length", "sequences"):
            check_integer(name, getattr(self, name), at_least=1)
        if self.devices > MOST_DEVICES:
            raise ValueError(f"devices must be at most {MOST_DEVICES}, got {self.devices}")
        for name in ("efficiency", "links", "usable"):
            check_within(name, getattr(self, name), "(0, 1]")
        if self.chip not in DEVICES:
            close = difflib.get_close_matches(self.chip.upper(), DEVICES, 1, cutoff=0.3)
            hint = f": did you mean {close[0]}?" if close else ""
            raise ValueError(f"chip must be one of {', '.join(DEVICES)}, got {self.chip!r}{hint}")
        config = self.shape.config
        if self.length > config.n_positions:
            raise ValueError(
                f"length must be at most the model's n_positions = {config.n_positions}, "
                f"got {self.length}"
            )
        for name, size in self.fixed.items():
            check_integer(name, size, at_least=1)
            if self.devices % size:
                raise ValueError(f"{name}={size} does not divide the {self.devices} devices")
        given = [self.fixed.get(name) for name in DIMENSIONS]
        if None not in given:  # their product
            DistributedConfig(*given).sizes(self.devices)  # type: ignore[arg-type]

    @property
    def room(self) -> float:
        """Bytes of a device that tensors may take."""
        return self.usable * DEVICES[self.chip].memory

    @property
    def peak(self) -> float:
        """Operations a second of a chip."""
        peak = peak_flops(self.chip)
        assert peak is not None
        return peak


@dataclass(frozen=True)
class Plan:
    """A split, and the modelled cost of a step.

    Attributes:
        backwards: of a process in a step.
        sent: bytes that a device sends in a step, by cause.
        fits: whether the memory suffices.
    """

    job: Job
    split: Split
    backwards: int
    memory: Memory
    seconds: Seconds
    sent: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.job.room

    @property
    def tokens_per_second(self) -> float:
        return self.job.sequences * self.job.length / self.seconds.step

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: operations without those that are computed again."""
        flops = self.job.shape.flops(self.job.length) * self.tokens_per_second
        return flops / (self.job.devices * self.job.peak)


def plans(job: Job) -> list[Plan]:
    """A plan for each way to divide the devices, with its best batch; those that fit come first.

    The fastest is the first. Of those within a percent of it the simplest is: with the least tensor
    and context, without activation checkpointing, with the least memory. Those that do not fit are
    ordered by memory.

    Raises:
        ValueError: there is no way to divide them; the message says why.
    """
    found = [best for split in _splits(job) if (best := _best(job, split))]
    if not found:
        raise ValueError(_indivisible(job))
    fitting = sorted((p for p in found if p.fits), key=lambda plan: plan.seconds.step)
    if fitting:
        limit = TIE * fitting[0].seconds.step
        ties = [plan for plan in fitting if plan.seconds.step <= limit]
        fitting = sorted(ties, key=_complexity) + fitting[len(ties) :]
    others = sorted((p for p in found if not p.fits), key=lambda plan: plan.memory.total)
    return fitting + others


def _complexity(plan: Plan) -> tuple[float, ...]:
    split = plan.split
    return split.tensor * split.context, split.recompute, split.replicate > 1, plan.memory.total


def _splits(job: Job) -> Iterator[Split]:
    """All that divide devices, heads and sequences."""
    config, machine = job.shape.config, DEVICES[job.chip].machine
    divisors = [n for n in range(1, job.devices + 1) if job.devices % n == 0]
    choices = {name: [job.fixed[name]] if name in job.fixed else divisors for name in DIMENSIONS}
    for tensor in choices["tensor"]:
        if any(size % tensor for size in (config.n_head, config.kv_heads, config.feedforward_dim)):
            continue
        if tensor > machine and "tensor" not in job.fixed:
            continue
        for context in choices["context"]:
            if context > 1 and job.length % (2 * context):  # ring attention's pieces
                continue
            for replicate in choices["replicate"]:
                shard, left = divmod(job.devices, tensor * context * replicate)
                if left or shard not in choices["shard"] or job.sequences % (replicate * shard):
                    continue
                yield Split(replicate, shard, context, tensor)


def _best(job: Job, split: Split) -> Plan | None:
    """The fastest of all batches, with activation checkpointing or not, that fits; else the least
    memory.
    """
    each = job.sequences // split.readers
    batches = [n for n in range(1, min(each, LARGEST_BATCH) + 1) if each % n == 0]
    tried = [
        _plan(job, split._replace(batch=batch, recompute=recompute), each // batch)
        for recompute in (False, True)
        for batch in batches
    ]
    fitting = [plan for plan in tried if plan.fits]
    if not fitting:
        return min(tried, key=lambda plan: plan.memory.total)
    limit = TIE * min(plan.seconds.step for plan in fitting)
    return min(
        (plan for plan in fitting if plan.seconds.step <= limit),
        key=lambda plan: (plan.split.recompute, plan.memory.total),
    )


def _plan(job: Job, split: Split, backwards: int) -> Plan:
    device, common = DEVICES[job.chip], (job.shape, split, job.numbers, job.length)
    sent: dict[str, float] = {}
    for message in messages(*common, backwards):
        sent[message.cause] = sent.get(message.cause, 0.0) + message.sent
    time = seconds(*common, backwards, device, job.efficiency * job.peak, job.links)
    return Plan(job, split, backwards, memory(*common, backwards), time, sent)


def _indivisible(job: Job) -> str:
    config = job.shape.config
    fixed = ", ".join(f"{name}={size}" for name, size in job.fixed.items())
    return (
        f"{job.devices} devices cannot be divided{f' with {fixed}' if fixed else ''}: replicate x "
        f"shard must divide the {job.sequences} sequences of a step, tensor the {config.n_head} "
        f"heads, {config.kv_heads} heads of keys and {config.feedforward_dim} hidden columns, and "
        f"2 x context the {job.length} tokens of a sequence"
    )
