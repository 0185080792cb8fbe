"""A cell of a benchmark on any device: check every peer, time those that can, one row of data.

The order inside a cell: random inputs, so many sets of them that a GPU's L2 keeps none from one
call to the next; the definition in float64 on the same rounded inputs; every peer run once and
compared with it; then all that ran, by turns.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peers import Outputs, Peer, Refused
from timing import Candidate, batch_time, interleave, ratio, rotating
from torch import Tensor

OURS = "ours"
ROTATION_BYTES = 256 << 20  # more than twice the L2 of any GPU
MOST_SETS = 8
MAX_FACTOR, RMS_FACTOR, ULPS = 2.0, 1.5, 4.0  # the rule of the tests (tests/oracle.py)

Tensors = tuple[Tensor, ...]


class DeviceLost(Exception):
    """The GPU's context is broken: nothing more can be measured in this process."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured, apart from how. Every subject derives its cells from this.

    `against` holds functions of peers.py by name, `OURS` among them.
    """

    op: str
    device: str
    dtype: str
    backward: bool
    against: Mapping[str, Callable[..., Peer]]

    @property
    def axes(self) -> dict[str, Any]:
        """Sizes and options, by name."""
        raise NotImplementedError

    @property
    def flops(self) -> float | None:
        """Floating-point operations of the work; None where its bytes are the measure."""
        return None

    @property
    def bytes(self) -> float | None:
        """Bytes that must be read or written; None where its operations are the measure."""
        return None

    def inputs(self) -> Tensors:
        """Fresh random inputs on the device."""
        raise NotImplementedError

    def definition(self, *inputs: Tensor) -> Outputs:
        """The plain formula in the dtype of `inputs`."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """How many outputs there are; each is of the first input's shape and dtype."""
        return 1

    def part(self, tensor: Tensor) -> Tensor:
        """What is compared of an input, an output or a gradient: all of it unless too large."""
        return tensor

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def title(self) -> str:
        axes = " ".join(f"{name}={value}" for name, value in self.axes.items())
        return f"{self.op} {self.direction} {axes} {self.dtype}"

    limit = 90.0  # seconds after which a cell must be stuck

    def measure(self, seconds: float = 1.5) -> dict[str, Any]:
        """The row of this cell, timed for about `seconds`."""
        return measure(self, seconds)


def measure(cell: Cell, seconds: float) -> dict[str, Any]:
    """Check and time every peer. What a peer cannot do, or breaks, stays in its own entry."""
    torch.manual_seed(0)
    inputs = cell.inputs()
    sets = 1
    if cell.device == "cuda":
        sets = min(MOST_SETS, math.ceil(ROTATION_BYTES / sum(x.nbytes for x in inputs)))
    input_sets = [inputs, *(cell.inputs() for _ in range(sets - 1))]
    grad_sets = [
        tuple(torch.randn_like(inputs[0]) for _ in range(cell.outputs)) for _ in input_sets
    ]
    part_inputs, part_grads = (tuple(map(cell.part, x)) for x in (inputs, grad_sets[0]))
    double = (tuple(x.double() for x in tensors) for tensors in (part_inputs, part_grads))
    exact = _results(cell, cell.definition, *double)
    eager = _results(cell, cell.definition, part_inputs, part_grads)

    entries: dict[str, dict[str, Any]] = {}
    timed: dict[str, Peer] = {}
    candidates: list[Candidate] = []
    for name, make in cell.against.items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                peer = make(cell)
                entries[name] = _check(cell, peer, inputs, grad_sets[0], exact, eager)
                candidate = _candidate(cell, name, peer, input_sets, grad_sets)
                batch_time(candidate, len(input_sets), cell.device)  # what fails, fails here
                candidates.append(candidate)
                timed[name] = peer
            except Exception as failure:
                kind = "error" if name == OURS else "refused"
                entries[name] = {kind: reason(failure, warned)}
                if cell.device == "cuda":
                    synchronize(cell.device)
                    torch.cuda.empty_cache()
    samples = interleave(
        candidates, device=cell.device, rounds=15, batch_seconds=2e-3, seconds=seconds
    )
    for name, sample in samples.items():
        entries[name] |= sample.as_dict() | _rates(cell, timed[name], sample.median)
        if name != OURS and OURS in samples:
            entries[name]["times_ours"] = ratio(sample, samples[OURS]).as_dict()
    _share_ceilings(entries, [name for name, peer in timed.items() if peer.ceiling])
    return {
        "title": cell.title,
        "op": cell.op,
        "direction": cell.direction,
        "dtype": cell.dtype,
        "axes": cell.axes,
        "input_sets": sets,
        "reference": "float64",
        "peers": entries,
        "right": entries[OURS].get("right", False),
    }


def _rates(cell: Cell, peer: Peer, seconds: float) -> dict[str, float]:
    rates = {}
    if cell.flops is not None:
        rates["tflops"] = cell.flops / seconds / 1e12
    moved = peer.bytes if peer.bytes is not None else cell.bytes
    if moved is not None:
        rates["gbps"] = moved / seconds / 1e9
    return rates


def _share_ceilings(entries: Mapping[str, dict[str, Any]], ceilings: Sequence[str]) -> None:
    """Say of every rate which share it is of the ceiling measured beside it."""
    for ceiling in ceilings:
        for entry in entries.values():
            for rate in ("tflops", "gbps"):
                if rate in entry:
                    entry[f"share_of_{ceiling}"] = entry[rate] / entries[ceiling][rate]


def _check(
    cell: Cell, peer: Peer, inputs: Tensors, grads: Tensors, exact: Tensors, eager: Tensors
) -> dict[str, Any]:
    """Run a peer once, compilation included, and compare what it gives."""
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
    """What is compared: the outputs, or the gradient of every input."""
    if not cell.backward:
        with torch.no_grad():
            return _tuple(function(*inputs))
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    return torch.autograd.grad(_tuple(function(*inputs)), inputs, grads)


def _candidate(
    cell: Cell,
    name: str,
    peer: Peer,
    input_sets: Sequence[Tensors],
    grad_sets: Sequence[Tensors],
) -> Candidate:
    """The call to be timed, on rotating inputs: forward without gradients, or backward alone."""

    @contextmanager
    def without_gradients() -> Iterator[None]:
        with torch.no_grad(), peer.context():
            yield

    if peer.ceiling or not cell.backward:
        return Candidate(name, rotating(peer.function, input_sets), without_gradients)
    saved = []
    for inputs, grads in zip(input_sets, grad_sets, strict=True):
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        with peer.context():
            saved.append((_tuple(peer.function(*leaves)), leaves, grads))

    def backward(outputs: Tensors, leaves: Tensors, grads: Tensors) -> Tensors:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return Candidate(name, rotating(backward, saved), peer.context)


def compare(got: Tensors, exact: Tensors, eager: Tensors) -> list[dict[str, Any]]:
    """Errors of each result against float64, beside those of plain PyTorch in the same dtype.

    `within`: the largest error is at most twice, the rms error at most 1.5 times that of plain
    PyTorch, but for a few units in the last place of the result's scale. NaN never is.
    """
    rows: list[dict[str, Any]] = []
    for ours, true, plain in zip(got, exact, eager, strict=True):
        if ours.shape != true.shape:
            raise ValueError(f"result of shape {tuple(ours.shape)}, expected {tuple(true.shape)}")
        slack = ULPS * torch.finfo(ours.dtype).eps * true.abs().max().item()
        (largest, rms), (eager_largest, eager_rms) = _errors(ours, true), _errors(plain, true)
        within = (
            largest <= MAX_FACTOR * eager_largest + slack and rms <= RMS_FACTOR * eager_rms + slack
        )
        rows.append(
            {"max": largest, "rms": rms, "eager_max": eager_largest, "eager_rms": eager_rms}
            | {"within": within}
        )
    return rows


def _errors(got: Tensor, true: Tensor) -> tuple[float, float]:
    off = got.double() - true
    return off.abs().max().item(), off.square().mean().sqrt().item()


def _tuple(result: Outputs) -> Tensors:
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
