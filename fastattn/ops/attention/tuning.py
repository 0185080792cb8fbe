"""The search for other tiles of the attention kernels on the GPU at hand, for `fastattn tune`.

From the tile of the table the search walks to the fastest tile that differs by one step in one
number, again and again, until none is faster. Times are interleaved in one run, those of the
present tile twice. A tile is proposed if, in a second run, the 20th percentile of its speed-up over
the rounds is above the 80th percentile of the present tile's against itself, and above 1.02.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastattn import timing
from fastattn.ops.attention import tiles
from fastattn.ops.attention.call import NO_GRADIENT
from fastattn.ops.attention.problem import check
from fastattn.ops.attention.tiles import Tile
from fastattn.ops.common import launch
from fastattn.timing import Candidate, Spread

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {
    tiles.FORWARD: "_forward_kernel",
    tiles.DECODE: "_forward_kernel",
    tiles.KEYS: "_keys_kernel",
    tiles.QUERIES: "_queries_kernel",
    tiles.BIAS: "_bias_kernel",
}
HEAD_DIMS = (64, 128, 256, 512)  # the widths of the table

# (batch, heads, kv_heads) of the problems
PREFILL = (2, 16, 8)
DECODE = (16, 32, 8)

LEAST_GAIN = 1.02
ROUNDS, CONFIRMING_ROUNDS = 11, 31
ROUNDINGS = 16  # by which results of two tiles may differ, in units of the largest one's last place

# Sizes that a kernel takes: powers of two from 16 (tl.dot) to 128 (32-bit offsets).
BLOCKS = (16, 32, 64, 128)
WARPS = (2, 4, 8)
STAGES = (1, 2, 3, 4, 5)

Tensors = tuple[torch.Tensor, ...]


# --- what is tuned --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tile of the table: a row, and one of its columns."""

    kernel: str
    dtype: str
    head_dim: int
    masking: str
    architecture: int

    @property
    def row(self) -> tuple[str | int, ...]:
        size = DTYPES[self.dtype].itemsize
        return tiles.row(self.kernel, self.architecture, size, self.head_dim)

    def tile(self, masking: str | None = None) -> Tile:
        """The table's tile, of this column or of the one named."""
        size = DTYPES[self.dtype].itemsize
        return tiles.tile(
            self.kernel, self.architecture, size, self.head_dim, masking or self.masking
        )

    def __str__(self) -> str:
        return f"{self.kernel}, {self.dtype}, head_dim {self.head_dim}, {self.masking}"


def entries_of(
    architecture: int,
    kernels: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    maskings: Sequence[str],
) -> list[Entry]:
    """The entries that this GPU reads, each once; a bias is a feature, so BIAS has no plain one."""
    found: dict[Any, Entry] = {}
    for kernel in kernels:
        for dtype in dtypes:
            for head_dim in sorted(head_dims, reverse=True):  # the widest that a row serves
                for masking in maskings:
                    entry = Entry(kernel, dtype, head_dim, masking, architecture)
                    if kernel != tiles.BIAS or masking != tiles.PLAIN:
                        found.setdefault((entry.row, dtype, masking), entry)
    return list(found.values())


def problem(entry: Entry, seqlen: int, device: torch.device) -> Callable[[], Tensors]:
    """A call that launches the entry's kernel, and returns what it wrote.

    Causal; FEATURED by a bias, CROWDED by a mask too.
    """
    from fastattn.ops.attention import triton as kernels

    decode = entry.kernel == tiles.DECODE
    batch, heads, kv_heads = DECODE if decode else PREFILL
    seqlen_q = 1 if decode else seqlen
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        dtype = DTYPES[entry.dtype]
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    q = normal(batch, seqlen_q, heads, entry.head_dim)
    k, v = (normal(batch, seqlen, kv_heads, entry.head_dim) for _ in range(2))
    features: dict[str, Any] = {"causal": True}
    if entry.masking != tiles.PLAIN:
        features["bias"] = normal(1, 1, seqlen_q, seqlen)
    if entry.masking == tiles.CROWDED:
        features["mask"] = torch.ones(1, 1, seqlen_q, seqlen, dtype=torch.bool, device=device)
    settings, extras = check(q, k, v, **features)
    if entry.kernel in (tiles.FORWARD, tiles.DECODE):
        return lambda: kernels.forward(q, k, v, extras, settings)
    out, lse = kernels.forward(q, k, v, extras, settings)
    dout = normal(*out.shape)

    def backward() -> Tensors:
        wanted = NO_GRADIENT._replace(bias=entry.kernel == tiles.BIAS)
        dq, dk, dv, dbias, _ = kernels.backward(
            dout, None, out, lse, wanted, q, k, v, extras, settings
        )
        return {tiles.KEYS: (dk, dv), tiles.QUERIES: (dq,), tiles.BIAS: (dbias,)}[entry.kernel]

    return backward


# --- one tile -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A tile whose kernel has been launched, and the launch, to be repeated."""

    tile: Tile
    launch: launch.Launch
    results: Tensors


def attempt(entry: Entry, tile: Tile, call: Callable[[], Tensors], present: Tensors) -> Trial | str:
    """Launch the kernel with `tile`; the reason if it cannot run, or computes something else."""
    try:
        with tiles.overridden(entry.kernel, tile), launch.recorded() as launches:
            results = call()
        for result in results:
            if result.device.type == "cuda":
                torch.cuda.synchronize(result.device)
    # A tile that is too large fails in one of many ways: in a pass of the compiler, in ptxas, at
    # the launch. Which it was is said, and the search goes on.
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    (its,) = (x for x in launches if x.kernel.fn.__name__ == KERNELS[entry.kernel])
    for ours, theirs in zip(results, present):
        difference = (ours.double() - theirs.double()).nan_to_num(0.0, math.inf, math.inf)
        scale = theirs.double().abs().nan_to_num(0.0, 0.0).max().item()
        allowed = ROUNDINGS * torch.finfo(ours.dtype).eps * scale
        if not difference.abs().max().item() <= allowed or not torch.equal(
            ours.isnan(), theirs.isnan()
        ):
            return f"its result differs by {difference.abs().max():.2e}, more than {allowed:.2e}"
    return Trial(tile, its, results)


# --- times ----------------------------------------------------------------------------------------

Timer = Callable[[Sequence[Trial], int], list[list[float]]]  # (trials, rounds) -> seconds


def interleaved(trials: Sequence[Trial], rounds: int) -> list[list[float]]:
    """Seconds of each launch, one value a round."""
    candidates = [Candidate(str(n), trial.launch.run) for n, trial in enumerate(trials)]
    samples = timing.interleave(candidates, device="cuda", rounds=rounds)
    return [list(samples[candidate.name].seconds) for candidate in candidates]


@dataclass(frozen=True)
class Gain(Spread):
    """A speed-up over the present tile, over the rounds."""

    @classmethod
    def over(cls, present: Sequence[float], other: Sequence[float]) -> Gain:
        spread = Spread.of(a / b for a, b in zip(present, other, strict=True))
        return cls(spread.median, spread.p20, spread.p80)

    def beats(self, noise: Gain) -> bool:
        return self.p20 > max(noise.p80, LEAST_GAIN)

    def __str__(self) -> str:
        return f"{self.median:.3f}x [{self.p20:.3f}, {self.p80:.3f}]"


# --- the search -----------------------------------------------------------------------------------


def neighbours(tile: Tile, kernel: str) -> Iterator[Tile]:
    """The tiles one step away in one number, and those of equal area one step wider or higher."""
    sides = (16,) if kernel == tiles.DECODE else BLOCKS  # DECODE_ROWS fit in the smallest
    values = {"block_m": sides, "block_n": BLOCKS, "warps": WARPS, "stages": STAGES}
    for name, allowed in values.items():
        value = getattr(tile, name)
        smaller = [x for x in allowed if x < value]
        larger = [x for x in allowed if x > value]
        for step in (*smaller[-1:], *larger[:1]):
            yield replace(tile, **{name: step})
    for m, n in ((tile.block_m * 2, tile.block_n // 2), (tile.block_m // 2, tile.block_n * 2)):
        if m in sides and n in BLOCKS:
            yield replace(tile, block_m=m, block_n=n)


@dataclass
class Outcome:
    """The result for an entry."""

    entry: Entry
    present: Tile
    seconds: float = math.nan  # of the present tile, the median
    gains: dict[str, Gain] = field(default_factory=dict)  # by tile, as first measured
    skipped: dict[str, str] = field(default_factory=dict)  # tile -> reason
    finished: bool = True  # False: the budget ended the search
    proposed: Tile | None = None
    proposed_gain: Gain | None = None
    noise: Gain | None = None  # of the present tile against itself, in the run that confirmed


def search(entry: Entry, call: Callable[[], Tensors], timer: Timer, seconds: float) -> Outcome:
    """Walk from the present tile to faster ones for so many seconds; confirm the last one."""
    end = time.monotonic() + seconds
    outcome = Outcome(entry, entry.tile())
    present = attempt(entry, outcome.present, call, ())
    if isinstance(present, str):
        outcome.skipped[written(outcome.present)] = present
        return outcome
    best, tried = present, {outcome.present}
    while True:
        trials = []
        for tile in neighbours(best.tile, entry.kernel):
            if tile in tried:
                continue
            if time.monotonic() >= end:
                outcome.finished = False
                break
            tried.add(tile)
            trial = attempt(entry, tile, call, present.results)
            if isinstance(trial, str):
                outcome.skipped[written(tile)] = trial
            else:
                trials.append(trial)
        if not trials:
            break
        of_present, again, of_best, *others = timer([present, present, best, *trials], ROUNDS)
        outcome.seconds = statistics.median(of_present)
        noise = Gain.over(of_present, again)
        gains = [Gain.over(of_present, times) for times in others]
        outcome.gains |= {written(trial.tile): gain for trial, gain in zip(trials, gains)}
        fastest = max(range(len(trials)), key=lambda n: gains[n].median)
        if not Gain.over(of_best, others[fastest]).beats(noise):
            break
        best = trials[fastest]
    if best is not present:
        of_present, again, of_best = timer([present, present, best], CONFIRMING_ROUNDS)
        outcome.noise, gain = Gain.over(of_present, again), Gain.over(of_present, of_best)
        if gain.beats(outcome.noise):
            outcome.proposed, outcome.proposed_gain = best.tile, gain
    return outcome


def tune(
    entries: Sequence[Entry], device: torch.device, seqlen: int, budget: float, timer: Timer
) -> Iterator[Outcome]:
    """Search every entry; the seconds of `budget` that one leaves, the next ones get."""
    end = time.monotonic() + budget
    for index, entry in enumerate(entries):
        share = (end - time.monotonic()) / (len(entries) - index)
        yield search(entry, problem(entry, seqlen, device), timer, share)


# --- in words -------------------------------------------------------------------------------------


def written(tile: Tile) -> str:
    """A tile as the table has it."""
    return f"Tile({tile.block_m}, {tile.block_n}, {tile.warps}, {tile.stages})"


def described(outcome: Outcome) -> Iterator[str]:
    """The result for an entry, in lines."""
    timed = "" if math.isnan(outcome.seconds) else f", {outcome.seconds * 1e6:.1f} us"
    yield f"{outcome.entry}: {written(outcome.present)}{timed}"
    for tile, gain in sorted(outcome.gains.items(), key=lambda pair: -pair[1].median):
        yield f"  {tile}  {gain}"
    for tile, reason in outcome.skipped.items():
        yield f"  {tile}  skipped: {reason}"
    if not outcome.finished:
        yield "  the budget ended the search: --budget gives it more seconds"
    if outcome.proposed is not None:
        yield f"  proposed: {written(outcome.proposed)}  {outcome.proposed_gain}"
        yield f"  the present tile against itself: {outcome.noise}"


def proposals(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Rows to paste into the table; dtypes that share a row must agree on its tile."""
    rows: dict[tuple[str | int, ...], dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        columns = rows.setdefault(outcome.entry.row, {})
        columns.setdefault(outcome.entry.masking, []).append(outcome)
    lines = []
    for row, columns in rows.items():
        new, reasons = {}, []
        for masking, found in columns.items():
            wanted = {outcome.proposed for outcome in found}
            if wanted == {None}:
                continue
            told = ", ".join(f"{x.entry.dtype} {x.proposed_gain or 'as it is'}" for x in found)
            if len(wanted) > 1:
                lines.append(f"    # {key_of(row)} {masking} stays, dtypes disagree: {told}")
                continue
            (new[masking],) = wanted
            reasons.append(f"{masking}: {told}")
        if new:
            entry = next(iter(columns.values()))[0].entry
            values = ", ".join(written(new.get(x) or entry.tile(x)) for x in tiles.MASKINGS)
            lines.append(f"    {key_of(row)}: ({values}),  # {'; '.join(reasons)}")
    if not lines:
        yield "No row of fastattn/ops/attention/tiles.py would change."
        return
    yield "Rows of fastattn/ops/attention/tiles.py that would change:"
    yield from lines


def key_of(row: tuple[str | int, ...]) -> str:
    """A row's key as the table has it."""
    kernel, *rest = row
    return f"({', '.join([str(kernel).upper(), *(json.dumps(x) for x in rest)])})"
