"""Which kernels are faster on this GPU: the first half of `fastattn tune`.

Plain calls of every op run on each backend that is able to, that has proved itself, interleaved in
one run. A backend is good at a size if no later one in the order is faster by more than the noise;
one that is not written for this architecture, if it is faster than all later ones. The sizes at
which it is good make a row of the user's table (fastattn/measured.py).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastattn
from fastattn import backends, measured, proving, timing
from fastattn.measured import Faster, Key
from fastattn.timing import Candidate, Sample

FASTER = 0.98  # of another one's time, in four of five rounds
CELL_SECONDS, ROUNDS = 0.5, 15
OTHER = "torch"  # what runs if no kernel does

SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "attention": ((1, 256), (2, 1024), (2, 4096), (1, 16384)),  # batch, seqlen
    "ffn": ((16, 1024, 4096), (512, 1024, 4096), (4096, 1024, 4096), (4096, 4096, 16384)),
    "losses": ((256, 1024, 32000), (4096, 1024, 32000)),  # rows, features, classes
    "rotary": ((1, 256), (2, 4096)),  # batch, seqlen
    "norms": ((256, 1024), (4096, 1024), (4096, 4096), (16384, 8192)),  # rows, hidden
    "decoding": ((1, 4096), (8, 4096), (64, 4096)),  # batch, capacity
}

Timer = Callable[[Sequence[Candidate]], Mapping[str, Sample]]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def interleaved(candidates: Sequence[Candidate]) -> Mapping[str, Sample]:
    return timing.interleave(candidates, device="cuda", rounds=ROUNDS, seconds=CELL_SECONDS)


@dataclass
class Kind:
    """What was measured of an op in a dtype, with or without gradients."""

    op: str
    dtype: torch.dtype
    needs_grad: bool | None
    good: dict[str, dict[int, bool]]  # by backend and size
    than: dict[str, str]  # the next one after each backend


def compare(
    device: torch.device, dtypes: Sequence[torch.dtype], seconds: float, timer: Timer
) -> dict[Key, Faster]:
    """Measure, print what was measured, and return the rows; no new call begins after `seconds`."""
    kinds: dict[tuple[Any, ...], Kind] = {}
    end = time.monotonic() + seconds
    for dtype in dtypes:
        for grad in (False, True):
            for call in calls(dtype, device, grad):
                if time.monotonic() >= end:
                    print("  the budget ended the comparison: --budget gives it more seconds")
                    return rows(kinds.values(), device)
                _measure(call, kinds, timer)
    return rows(kinds.values(), device)


def calls(dtype: torch.dtype, device: torch.device, grad: bool) -> Iterator[Call]:
    """Plain calls of the ops, small and large ones. A norm's plan does not know of gradients."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)

    for batch, seqlen in SIZES["attention"]:
        for head_dim in (64, 128):
            q, k, v = (normal(batch, seqlen, heads, head_dim) for heads in (16, 4, 4))
            yield fastattn.attention, (q, k, v), {"causal": True}
    for rows_, features, hidden in SIZES["ffn"]:
        x, w1, w2 = normal(rows_, features), normal(hidden, features), normal(features, hidden)
        b1, b2 = normal(hidden), normal(features)
        yield fastattn.ffn, (x, w1, b1, w2, b2), {}
        yield fastattn.linear, (x, w1, b1, "gelu_tanh"), {}
    for rows_, features, classes in SIZES["losses"]:
        x, head = normal(rows_, features), normal(classes, features)
        targets = torch.randint(classes, (rows_,), device=device)
        yield fastattn.cross_entropy, (normal(rows_, classes), targets), {}
        yield fastattn.linear_cross_entropy, (x, head, targets), {}
    for batch, seqlen in SIZES["rotary"]:
        q, k = normal(batch, seqlen, 16, 128), normal(batch, seqlen, 4, 128)
        cos = torch.randn(batch, seqlen, 64, device=device)
        yield fastattn.rotary, (q, k, cos, cos), {}
    if grad:
        for rows_, hidden in SIZES["norms"]:
            x, weight = normal(rows_, hidden), normal(hidden)
            yield fastattn.layer_norm, (x, weight, weight), {}
            yield fastattn.rms_norm, (x, weight, 1e-6), {}
        return
    for batch, capacity in SIZES["decoding"]:
        q, k, v = (normal(batch, n, h, 128) for n, h in ((1, 32), (capacity, 8), (capacity, 8)))
        lengths = torch.full((batch,), capacity - 1, dtype=torch.int32, device=device)
        yield fastattn.attention_with_kv_cache, (q, k, v, lengths), {}


def _measure(call: Call, kinds: dict[tuple[Any, ...], Kind], timer: Timer) -> None:
    """Time a call on each backend, and add to its kind what was found."""
    function, args, kwargs = call
    problem, kernels = backends.problem_of(function, *args, **kwargs)
    names = [
        kernel.name
        for kernel in kernels
        if proving.declined(kernel.name, problem, prove=True) is None
    ]
    if not names:
        return
    names.append(OTHER)
    candidates = [Candidate(name, _run(function, args, kwargs, name)) for name in names]
    label = f"{problem.op} on {problem.describe()}"
    try:
        samples = timer(candidates)
    except RuntimeError as error:  # of memory, or of what a backend has no gradient of
        torch.cuda.empty_cache()
        print(f"  {label}: left out, {' '.join(str(error).split())[:160]}", flush=True)
        return
    times = ", ".join(f"{name} {1e6 * samples[name].median:.1f} us" for name in names)
    print(f"  {label}: {times}", flush=True)
    key = problem.op, problem.dtype, problem.needs_grad
    kind = kinds.setdefault(key, Kind(*key, {}, {}))
    for place, name in enumerate(names[:-1]):
        later = [samples[other] for other in names[place + 1 :]]
        sizes, size = kind.good.setdefault(name, {}), problem.elements
        written_for = measured.WRITTEN_FOR.get(name)
        surely = written_for is not None and written_for not in measured.devices(problem.device)
        good = _good(samples[name], later, surely=surely)
        sizes[size] = good and sizes.get(size, True)
        kind.than[name] = names[place + 1]


def _run(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], backend: str
) -> Callable[[], object]:
    """A call, with its backward if an argument wants a gradient."""
    leaves = list({id(x): x for x in args if getattr(x, "requires_grad", False)}.values())

    def forward() -> Any:
        return function(*args, **kwargs, backend=backend)

    def both() -> Any:
        results = forward()
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])

    return both if leaves else forward


def _good(ours: Sample, later: Sequence[Sample], *, surely: bool) -> bool:
    """Whether none of the later ones is faster; `surely`: whether all are slower."""
    if surely:
        return all(timing.ratio(ours, other).p80 < FASTER for other in later)
    return not any(timing.ratio(other, ours).p80 < FASTER for other in later)


def rows(kinds: Iterable[Kind], device: torch.device) -> dict[Key, Faster]:
    """The rows of the user's table."""
    name, date = measured.devices(device)[0], datetime.date.today().isoformat()
    found = {}
    for kind in kinds:
        dtype = str(kind.dtype).removeprefix("torch.")
        for backend, sizes in kind.good.items():
            key = Key(kind.op, backend, dtype, kind.needs_grad, name)
            limits = measured.limits(sizes) or (0, 0)
            found[key] = Faster(kind.than[backend], date, *limits)
    return found


def described(rows: Mapping[Key, Faster]) -> Iterator[str]:
    """The rows in words."""
    for key, row in rows.items():
        sides = [f"from {row.least}" if row.least else "", f"up to {row.most}" if row.most else ""]
        sizes = "never" if row.most == 0 else " ".join(filter(None, sides)) or "always"
        grads = {None: "", True: ", with gradients", False: ", without gradients"}[key.needs_grad]
        yield f"{key.op}, {key.dtype}{grads}: {key.backend} before {row.than}: {sizes}"
