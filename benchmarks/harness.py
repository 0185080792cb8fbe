"""A cell of a benchmark on any device: check every peer, time those that can, one row of data.

The order inside a cell: random inputs, so many sets of them that a GPU's L2 keeps none from one
call to the next; the definition in float64 on the same rounded inputs; every peer run once and
compared with it; then all that ran, interleaved.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from environment import ROW_FIELDS, nvidia_smi
from facts import OURS
from peer import Outputs, Peer, Refused
from schema import Entry, Error, Row
from torch import Tensor

from fastattn import rule
from fastattn.timing import Candidate, Sample, batch_time, interleave, ratio, rotating

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward+backward")
ROTATION_BYTES = 256 << 20  # more than twice the L2 of any GPU
MOST_SETS = 8
ATTEMPTS = 4  # a row that misses its target is measured again, longer: it may be noise

Tensors = tuple[Tensor, ...]


class DeviceLost(Exception):
    """The GPU's context is broken: nothing more can be measured in this process."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement, described. Every subject derives its cells from this.

    `against` holds the makers of its peers by name, `OURS` among them. BACKWARD times only the
    backward, BOTH a forward and its backward.
    """

    op: str
    device: str
    dtype: str
    direction: str = FORWARD
    against: Mapping[str, Callable[..., Peer]]
    compile: bool = False  # whether torch.compile takes part
    target: str | None = None  # the promise of this cell, in words

    sizes: ClassVar[tuple[str, ...]] = ()  # the fields that are axes
    limit = 90.0  # seconds after which a cell must be stuck
    rounds = 15
    batch_seconds = 2e-3

    @property
    def axes(self) -> dict[str, Any]:
        """Sizes and options, by name."""
        axes = {name: getattr(self, name) for name in self.sizes}
        return axes | ({"compile": True} if self.compile else {})

    @property
    def flops(self) -> float | None:
        """Floating-point operations of the work; None where its bytes are the measure."""
        return None

    @property
    def bytes(self) -> float | None:
        """Bytes that must be read or written; None where its operations are the measure."""
        return None

    @property
    def bound(self) -> str | None:
        """The peer that is this cell's ceiling."""
        return None

    def randn(self, *shape: int) -> Tensor:
        """Random numbers in the cell's dtype, on its device."""
        return torch.randn(shape, device=self.device, dtype=self.torch_dtype)

    def inputs(self) -> Tensors:
        """Fresh random inputs on the device."""
        raise NotImplementedError

    def gradients(self, inputs: Tensors) -> Tensors:
        """Fresh random gradients of the outputs."""
        return tuple(torch.randn_like(inputs[0]) for _ in range(self.outputs))

    def definition(self, *inputs: Tensor) -> Outputs:
        """The plain formula in the dtype of `inputs`."""
        raise NotImplementedError

    def plain(self, *inputs: Tensor) -> Outputs:
        """PyTorch's own way in the cell's dtype: the measure of errors."""
        return self.definition(*inputs)

    @property
    def outputs(self) -> int:
        """How many outputs there are; of the first input's shape and dtype, or see `gradients`."""
        return 1

    @property
    def reference(self) -> str | None:
        """The dtype of the definition that results are compared with; None: they are not."""
        return "float64"

    def part(self, tensor: Tensor) -> Tensor:
        """The part of an input, an output or a gradient that is compared: all unless too large."""
        return tensor

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        """Whether `target` was kept."""
        return True

    @property
    def backward(self) -> bool:
        """Whether gradients are taken."""
        return self.direction != FORWARD

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def title(self) -> str:
        axes = " ".join(f"{name}={value}" for name, value in self.axes.items())
        return f"{self.op} {self.direction} {axes} {self.dtype}"

    def row(self, entries: dict[str, Entry]) -> Row:
        """The row before anything is timed."""
        row: Row = {
            "title": self.title,
            "op": self.op,
            "direction": self.direction,
            "dtype": self.dtype,
            "axes": self.axes,
            "right": False,
            "peers": entries,
        }
        if self.reference is not None:
            row["reference"] = self.reference
        if self.bound is not None:
            row["bound"] = self.bound
        if self.target is not None:
            row["target"] = self.target
        return row

    def measure(self, seconds: float, peers: Collection[str] | None = None) -> Row:
        """The row of this cell, timed for about `seconds`; with `peers`, only against those."""
        return measure(self, seconds, peers)


def measure(cell: Cell, seconds: float, peers: Collection[str] | None = None) -> Row:
    """Check and time every peer. A peer's failure stays in its own entry."""
    torch.manual_seed(0)
    inputs = cell.inputs()
    sets = 1
    if cell.device == "cuda":
        sets = min(MOST_SETS, math.ceil(ROTATION_BYTES / sum(x.nbytes for x in inputs)))
    input_sets = [inputs, *(cell.inputs() for _ in range(sets - 1))]
    grad_sets = [cell.gradients(inputs) for _ in input_sets]
    part_inputs, part_grads = (tuple(map(cell.part, x)) for x in (inputs, grad_sets[0]))
    precise = getattr(torch, cell.reference or "float64")
    rounded = (tuple(x.to(precise) for x in tensors) for tensors in (part_inputs, part_grads))
    exact = _results(cell, cell.definition, *rounded)
    eager = _results(cell, cell.plain, part_inputs, part_grads)

    entries: dict[str, Entry] = {}
    timed: dict[str, Peer] = {}
    candidates: list[Candidate] = []
    for name, make in chosen(cell.against, peers, cell.bound).items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                peer = make(cell)
                entries[name] = _check(cell, peer, inputs, grad_sets[0], exact, eager)
                candidate = _candidate(cell, name, peer, input_sets, grad_sets)
                batch_time(candidate, len(input_sets), cell.device)  # a failure is noticed here
                candidates.append(candidate)
                timed[name] = peer
            except Exception as failure:
                entries[name] = failed(name, failure, cell.device, warned)
    row = cell.row(entries)
    samples = timed_interleaved(cell, candidates, seconds, row)
    for name, sample in samples.items():
        entries[name].update(_rates(cell, timed[name], sample.median))
    _share_ceiling(entries, cell.bound)
    row["right"] = entries[OURS].get("right", False)
    return row


def chosen(
    against: Mapping[str, Callable[..., Peer]], peers: Collection[str] | None, bound: str | None
) -> Mapping[str, Callable[..., Peer]]:
    """The peers asked for; ours and the ceiling are always among them."""
    if peers is None:
        return against
    return {n: make for n, make in against.items() if n in peers or n in (OURS, bound)}


def timed_interleaved(
    cell: Cell, candidates: Sequence[Candidate], seconds: float, row: Row
) -> dict[str, Sample]:
    """Time the candidates and write into the row: samples, ratios to ours, the target."""
    entries = row["peers"]
    for attempt in range(1, ATTEMPTS + 1):
        samples = interleave(
            candidates,
            device=cell.device,
            rounds=cell.rounds * attempt,
            batch_seconds=cell.batch_seconds,
            seconds=seconds * attempt,
        )
        if cell.target is None or OURS not in samples or cell.holds(samples):
            break
    for name, sample in samples.items():
        if name not in entries:
            continue
        entries[name].update(sample.as_dict())  # type: ignore[typeddict-item]
        if name != OURS and OURS in samples:
            times_ours = ratio(sample, samples[OURS]).as_dict()
            entries[name]["times_ours"] = times_ours  # type: ignore[typeddict-item]
    if cell.target is not None:
        row["holds"] = OURS in samples and cell.holds(samples)
    if cell.device == "cuda" and (gpu := nvidia_smi(ROW_FIELDS)) is not None:
        row["gpu"] = gpu
    return samples


def failed(
    name: str,
    failure: Exception,
    device: str,
    warned: Sequence[warnings.WarningMessage] = (),
) -> Entry:
    """The entry of a peer that broke or refused; raises DeviceLost if the GPU broke with it."""
    said = reason(failure, warned)
    if device == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
    return {"error": said} if name == OURS else {"refused": said}


def _rates(cell: Cell, peer: Peer, seconds: float) -> Entry:
    rates: Entry = {}
    flops = peer.flops if peer.flops is not None else cell.flops
    moved = peer.bytes if peer.bytes is not None else cell.bytes
    if peer.ceiling:
        rates["ceiling"] = True
        # A ceiling of operations has no bytes, and the other way round.
        flops, moved = (None, moved) if peer.bytes is not None else (flops, None)
    if flops is not None:
        rates["tflops"] = flops / seconds / 1e12
    if moved is not None:
        rates["gbps"] = moved / seconds / 1e9
    return rates


def _share_ceiling(entries: Mapping[str, Entry], bound: str | None) -> None:
    """Say of every rate which share it is of the ceiling measured beside it."""
    ceiling = entries.get(bound or "", {})
    for rate in ("tflops", "gbps"):
        if rate in ceiling:
            for entry in entries.values():
                if rate in entry:
                    entry["share"] = entry[rate] / ceiling[rate]  # type: ignore[literal-required]


def _check(
    cell: Cell, peer: Peer, inputs: Tensors, grads: Tensors, exact: Tensors, eager: Tensors
) -> Entry:
    """Run a peer once, compilation included, and compare its results."""
    if peer.ceiling:
        return {}
    start = time.perf_counter()
    with peer.context():
        got = _results(cell, peer.function, inputs, grads)
    synchronize(cell.device)
    first_call = time.perf_counter() - start
    errors = compare(tuple(map(cell.part, got)), exact, eager)
    right = all(error["within"] for error in errors)
    return {"first_call_seconds": first_call, "errors": errors, "right": right}


def _results(
    cell: Cell, function: Callable[..., Outputs], inputs: Tensors, grads: Tensors
) -> Tensors:
    """The results to compare: the outputs, or the gradient of every input."""
    if not cell.backward:
        with torch.no_grad():
            return as_tuple(function(*inputs))
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    return torch.autograd.grad(as_tuple(function(*inputs)), inputs, grads)


def _candidate(
    cell: Cell,
    name: str,
    peer: Peer,
    input_sets: Sequence[Tensors],
    grad_sets: Sequence[Tensors],
) -> Candidate:
    """The call to be timed, on rotating inputs: without gradients, only the backward, or both."""

    @contextmanager
    def without_gradients() -> Iterator[None]:
        with torch.no_grad(), peer.context():
            yield

    if peer.ceiling or cell.direction == FORWARD:
        return Candidate(name, rotating(peer.function, input_sets), without_gradients)
    leaves = [tuple(x.detach().requires_grad_() for x in inputs) for inputs in input_sets]
    if cell.direction == BOTH:

        def both(inputs: Tensors, grads: Tensors) -> Tensors:
            return torch.autograd.grad(as_tuple(peer.function(*inputs)), inputs, grads)

        return Candidate(name, rotating(both, list(zip(leaves, grad_sets))), peer.context)
    with peer.context():
        saved = [
            (as_tuple(peer.function(*inputs)), inputs, grads)
            for inputs, grads in zip(leaves, grad_sets, strict=True)
        ]

    def backward(outputs: Tensors, inputs: Tensors, grads: Tensors) -> Tensors:
        return torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    return Candidate(name, rotating(backward, saved), peer.context)


def compare(got: Tensors, exact: Tensors, eager: Tensors) -> list[Error]:
    """Errors of each result against float64, beside those of plain PyTorch in the same dtype.

    `within`: the numeric rule holds (fastattn/rule.py). The scale of the terms is that of the
    inputs, 1.
    """
    rows: list[Error] = []
    for ours, true, plain in zip(got, exact, eager, strict=True):
        found = rule.compare(ours, plain, true, terms=1.0)
        rows.append(
            {
                "max": found.max,
                "rms": found.rms,
                "eager_max": found.eager_max,
                "eager_rms": found.eager_rms,
                "within": found.violation is None,
            }
        )
    return rows


def as_tuple(result: Outputs) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def synchronize(device: str) -> None:
    """Wait for the device. Raises DeviceLost where a failure has broken it."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise DeviceLost(str(lost)) from lost


def reason(error: BaseException, warned: Sequence[warnings.WarningMessage] = ()) -> str:
    """An exception, and the warnings before it, in one short text."""
    first = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
    lines = dict.fromkeys([first, *(str(warning.message) for warning in warned)])
    return " | ".join(" ".join(line.split())[:300] for line in lines)[:1500]
