"""Two estimates of a main loop's share of the tensor cores' peak, from its machine code.

`bound`: how long every unit of a quarter of a multiprocessor (SM) is busy for one trip of one warp.
The share is at most the products' time over the longest of them, as if all else were hidden.
`estimate`: the same trip clock by clock, for all warps that a quarter holds. Instructions, their
order, the compiler's stall counts and scoreboards, waits and barriers are read; the units' rates,
latencies, and the L2's rate are assumed. Not in it: clocks and power, bank conflicts, prologue and
epilogue, masked tiles, the tail of a grid.

Held against published speeds, kernels of one kind compare well; above about 65 % of the peak, what
the model lacks takes over. It ranks variants of one kernel. A GPU has the last word.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from compile import sass
from compile.sass import Code, Instruction

from fastattn import chips


@dataclass(frozen=True)
class Chip:
    """Rates for a quarter of an SM, if not said otherwise. Dense, 16-bit operands."""

    name: str
    flop: int  # of the tensor cores of an SM, a clock
    fma: int  # clocks of an FP32 instruction of a warp
    mma_sync: float  # share of the peak that mma.sync reaches
    shared: int  # bytes of an SM; a block takes 1 KB beside its own
    l2: float  # bytes a clock and SM, assumed
    registers: int = chips.REGISTERS  # of an SM
    threads: int = 2048

    @property
    def mma_clocks(self) -> float:
        """Of one HMMA.16816: 4096 FLOP."""
        return 4096 / (self.flop / 4) / self.mma_sync


# mma.sync reaches about 62 % of what wgmma does (Luo et al. 2024, arXiv:2402.13499, recalled).
CHIPS = {
    80: Chip("A100", 2048, 2, 1.0, chips.shared_memory(80) + 1024, 40.0),
    90: Chip("H100, H200", 4096, 1, 0.62, chips.shared_memory(90) + 1024, 32.0),
}
MUFU_CLOCKS = 8  # 16 results a clock and SM
ALU_CLOCKS = 2
ALU = ("max", "select", "int", "convert")
SHARED_RATE = 128  # bytes a clock and SM


def blocks_per_sm(chip: Chip, registers: int, threads: int, shared: int) -> int:
    """Blocks that an SM holds; 0: one does not fit.

    Registers are given to a warp by 256, and each quarter of an SM has its own.
    """
    warps = threads // 32
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(
        chip.registers // 4 // of_a_warp * 4 // warps,
        chip.shared // (-(-shared // 128) * 128 + 1024),
        chip.threads // threads,
        32,
    )


# --- the bound ------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """One trip of a loop: of one warp on its quarter of an SM."""

    instructions: int
    others_per_clock: float  # instructions beside the products for each clock of the products
    spills: int
    ideal: float  # clocks of its products at the peak
    busy: dict[str, float]  # clocks by unit

    @property
    def longest(self) -> str:
        return max(self.busy, key=lambda unit: self.busy[unit])

    @property
    def share(self) -> float:
        """Of the tensor cores' peak, at most."""
        return self.ideal / self.busy[self.longest]


def bound(trip: Code, chip: Chip, copied: float = 0.0, multicast: float = 0.0) -> Bound:
    """Of a trip; `copied`: bytes that TMA brings for it, which another warp issues.

    `multicast`: bytes of them that the L2 gives once for two blocks of a cluster, half for each.
    """
    kinds = Counter(sass.kind(x.opcode) for x in trip)
    tensor = shared = 0.0
    for x in trip:
        if w := sass.wgmma(x):
            tensor += sass.product_flop(x) / (chip.flop / 4)
            shared += w.shared_bytes / 4  # four warps share it
        else:
            tensor += sass.product_flop(x) / 4096 * chip.mma_clocks
            if sass.kind(x.opcode) == "shared" or x.opcode.startswith("LDGSTS"):
                shared += sass.shared_bytes(x.opcode)
    alu = sum(sass.kind(x.opcode) in ALU and not x.opcode.startswith("U") for x in trip)
    ideal = sum(map(sass.product_flop, trip)) / (chip.flop / 4)
    busy = {
        "tensor cores": tensor,
        "issue": len(trip),
        "exponentials": MUFU_CLOCKS * kinds["mufu"],
        "fma": chip.fma * (kinds["fp32"] + kinds["imad"]),
        "alu": ALU_CLOCKS * alu,
        "shared memory": (4 * shared + copied) / SHARED_RATE,  # of the four quarters
    }
    if copied:
        busy["L2"] = (copied - multicast / 2) / chip.l2
    return Bound(len(trip), (len(trip) - kinds["mma"]) / ideal, kinds["local"], ideal, busy)


CONSUMERS, STAGES = 3, 3  # of the products' main loop
RELEASE = 60  # clocks from the end of a product to the arrival at a barrier


def with_ends(trips: int, product: float, copy: float, end: float, ideal: float) -> float:
    """Share of the peak of a persistent kernel whose consumers end a tile after so many trips.

    A consumer takes `end` clocks for it, under the others' products as far as the ring lets these
    go on. All clocks are of a trip: its products as the busiest unit of an SM takes them (one
    consumer's after the other's), the copies of a stage from the L2, and products at the peak.
    """
    tiles = 40  # of which the second half is counted
    ready: list[float] = []  # when a stage's bytes are there
    over: list[list[float]] = [[] for _ in range(CONSUMERS)]  # when a consumer frees it
    free = [0.0] * CONSUMERS
    busy = copied = 0.0  # until when the tensor cores, and the L2
    marks = []
    while len(over[0]) < tiles * trips:
        while len(ready) < min(map(len, over)) + STAGES:
            released = max(x[len(ready) - STAGES] for x in over) if len(ready) >= STAGES else 0.0
            copied = max(copied, released) + copy
            ready.append(copied + L2_LATENCY)
        waiting = (i for i in range(CONSUMERS) if len(over[i]) < len(ready))
        at, next_one = min((max(free[i], ready[len(over[i])]), i) for i in waiting)
        busy = max(busy, at) + product
        over[next_one].append(busy + RELEASE)
        free[next_one] = busy + RELEASE
        if len(over[next_one]) % trips == 0:
            free[next_one] += end
            if next_one == 0:
                marks.append(busy)
    half = len(marks) // 2
    clocks = (marks[-1] - marks[half]) / (len(marks) - 1 - half)
    return trips * CONSUMERS * ideal / clocks


# --- clock by clock -------------------------------------------------------------------------------

# Clocks until a result is there.
MUFU_LATENCY, SHUFFLE_LATENCY, SHARED_LATENCY, MMA_LATENCY, WGMMA_LATENCY = 20, 24, 30, 33, 30
LATENCY = 12  # of everything else
STORE_LATENCY = 20
READ_LATENCY = 16  # of reading the operands, at most
L2_LATENCY = 400
BARRIER, MEMBAR = 24, 20  # what they take
TRIPS = 16  # simulated; the first half fills the pipeline


@dataclass(frozen=True)
class Setting:
    blocks: int  # on an SM
    warps: int  # of a block on a quarter
    queue: int  # wgmmas of a warpgroup that wait for the tensor core
    offset: int  # clocks by which each block starts after the one before
    turns: bool = False  # blocks multiply in turn, see estimate


class _Step:
    """An instruction as the simulation needs it, looked at once."""

    def __init__(self, x: Instruction, chip: Chip):
        op = x.opcode
        self.x, self.kind, self.wgmma = x, sass.kind(op), sass.wgmma(x)
        self.copy = op.startswith("LDGSTS")
        self.commits_wgmma = self.wgmma is not None and "gsb0" in x.operands
        self.commits_copies = op.startswith("LDGDEPBAR")
        self.membar = op.startswith("MEMBAR")
        self.takes_turn = self.gives_turn = False
        self.barrier = op.startswith("BAR.SYNC")
        # Groups that may stay open: of wgmmas, of copies.
        left = int(x.operands.rsplit("0x", 1)[1], 16) if "DEPBAR.LE" in op else 0
        self.wgmmas_left = left if op.startswith("WARPGROUP.DEPBAR") else None
        self.copies_left = left if op.startswith("DEPBAR.LE") and "SB0" in x.operands else None
        self.unit = self._unit()
        self.ideal = sass.product_flop(x) / (chip.flop / 4)
        if self.wgmma:
            self.tensor = max(self.ideal, self.wgmma.shared_bytes / SHARED_RATE)
        else:
            self.tensor = sass.product_flop(x) / 4096 * chip.mma_clocks
        # Shared memory: of a warp, and the L2: of the warps of all four quarters.
        moves = 128 if self.kind == "shuffle" else sass.shared_bytes(op)
        touches = self.copy or self.kind in ("shared", "shuffle")
        self.shared_clocks = max(2.0, 4 * moves / SHARED_RATE if touches else 0)
        self.loads = op.startswith(("LDG", "ATOM")) and self.kind == "global"
        wide = self.copy or (self.loads and ".128" in op)
        self.l2_bytes = 4 * sass.shared_bytes(op) if wide else 0

    def _unit(self) -> str | None:
        """What it needs to be free before it is issued."""
        of_kind = {"mma": "tensor", "mufu": "mufu", "fp32": "fma", "imad": "imad"}
        of_kind |= dict.fromkeys(("shared", "shuffle", "copy", "global", "local"), "lsu")
        if self.kind in of_kind:
            return of_kind[self.kind]
        if self.x.opcode.startswith(("U", "R2UR", "S2UR")):
            return "uniform"
        return "alu" if self.kind in ALU else None


class _Warp:
    """One warp of every four warps of a block."""

    def __init__(self, block: int, place: int, start: int):
        self.block, self.place = block, place
        self.next = 0  # instruction
        self.ready = start  # clock
        self.scoreboards = [0.0] * 6
        self.wgmmas: list[float] = []  # in the tensor core's queue: when each is over
        self.wgmma_groups: list[float] = []  # committed: when each is over
        self.copy_groups: list[float] = []
        self.copies = 0.0  # not committed yet: when the last arrives
        self.barriers = 0  # passed
        self.taken = self.given = 0  # turns
        self.ends: list[int] = []  # clocks at which trips ended


class _Quarter:
    """A quarter of an SM with all its warps, in the middle of a main loop."""

    def __init__(self, trip: Code, chip: Chip, setting: Setting):
        self.chip, self.setting = chip, setting
        self.steps = [_Step(x, chip) for x in trip]
        self.warps = [
            _Warp(block, place, setting.offset * block)
            for block in range(setting.blocks)
            for place in range(setting.warps)
        ]
        self.clock = 0
        self.free = dict.fromkeys(("fma", "imad", "alu", "mufu", "tensor", "lsu", "uniform"), 0.0)
        self.l2 = 0.0  # clock at which it is free
        self.at_barrier: dict[tuple[int, int], dict[int, int]] = {}
        if setting.turns:
            next(s for s in self.steps if "TRYWAIT" in s.x.opcode).takes_turn = True
            next(s for s in self.steps if "SYNCS.ARRIVE" in s.x.opcode).gives_turn = True

    def waits(self, warp: _Warp) -> bool:
        """Whether the warp's next instruction can't be issued at this clock."""
        now, step = self.clock, self.steps[warp.next]
        if warp.ready > now:
            return True
        wait = step.x.wait
        if wait and any(wait >> b & 1 and warp.scoreboards[b] > now for b in range(6)):
            return True
        if step.wgmmas_left is not None:
            return sum(end > now for end in warp.wgmma_groups) > step.wgmmas_left
        if step.copies_left is not None:
            return sum(end > now for end in warp.copy_groups) > step.copies_left
        if step.barrier:
            here = self.at_barrier.setdefault((warp.block, warp.barriers), {})
            here.setdefault(warp.place, now)
            return len(here) < self.setting.warps or now < max(here.values()) + BARRIER
        if step.takes_turn:
            before = self.warps[self.warps.index(warp) - self.setting.warps]
            return before.given < warp.taken + (warp.block > 0)
        if step.wgmma:
            return sum(end > now for end in warp.wgmmas) >= self.setting.queue
        return step.unit is not None and self.free[step.unit] > now

    def issue(self, warp: _Warp) -> None:
        now, step = self.clock, self.steps[warp.next]
        stall, latency = step.x.stall, float(LATENCY)
        if step.wgmma:
            end = self.free["tensor"] = max(now, self.free["tensor"]) + step.tensor
            warp.wgmmas = [x for x in warp.wgmmas if x > now] + [end]
            if step.commits_wgmma:
                warp.wgmma_groups = [x for x in warp.wgmma_groups if x > now]
                warp.wgmma_groups.append(end + WGMMA_LATENCY)
        elif step.unit == "tensor":
            self.free["tensor"] = max(now, self.free["tensor"]) + step.tensor
            latency = MMA_LATENCY
        elif step.unit == "mufu":
            self.free["mufu"] = now + MUFU_CLOCKS
            latency = MUFU_LATENCY
        elif step.unit == "fma":
            self.free["fma"] = now + self.chip.fma
        elif step.unit == "imad":
            self.free["imad"] = now + 2
            self.free["fma"] = max(self.free["fma"], now + self.chip.fma)
        elif step.unit == "lsu":
            latency = self._access(warp, step)
        elif step.unit:
            self.free[step.unit] = now + 2  # uniform, alu
        elif step.commits_copies:
            warp.copy_groups = [x for x in warp.copy_groups if x > now] + [warp.copies]
            warp.copies = 0.0
        elif step.barrier:
            warp.barriers += 1
        elif step.membar:
            stall = max(stall, MEMBAR)
        warp.taken += step.takes_turn
        warp.given += step.gives_turn
        self._release(warp, step.x, latency)
        warp.ready = now + max(1, stall)
        warp.next += 1
        if warp.next == len(self.steps):
            warp.next = 0
            warp.ends.append(now)

    def _access(self, warp: _Warp, step: _Step) -> float:
        """Of shared or global memory; its latency."""
        self.free["lsu"] = self.clock + (4 if step.kind == "copy" else step.shared_clocks)
        if step.copy:
            warp.copies = max(warp.copies, self._from_l2(step.l2_bytes))
            return STORE_LATENCY
        if step.kind == "global":
            return self._from_l2(step.l2_bytes) - self.clock if step.loads else STORE_LATENCY
        return SHUFFLE_LATENCY if step.kind == "shuffle" else SHARED_LATENCY + step.shared_clocks

    def _from_l2(self, count: int) -> float:
        """The clock at which so many bytes are here."""
        self.l2 = max(self.l2, self.clock) + count / self.chip.l2
        return self.l2 + L2_LATENCY

    def _release(self, warp: _Warp, x: Instruction, latency: float) -> None:
        """Set the scoreboards that the instruction releases."""
        if x.write_barrier < 6:
            warp.scoreboards[x.write_barrier] = self.clock + latency
        if x.read_barrier < 6:
            both = x.read_barrier == x.write_barrier
            before = 0 if both else warp.scoreboards[x.read_barrier]
            read = self.clock + min(latency, READ_LATENCY)
            warp.scoreboards[x.read_barrier] = max(before, read)

    def share(self) -> float:
        """Of the peak, once all warps made TRIPS trips. A warp is issued from until it waits."""
        turn, limit = 0, 400 * len(self.steps) * TRIPS
        while min(len(w.ends) for w in self.warps) < TRIPS:
            assert self.clock < limit, (
                "the simulation does not advance: a barrier that it misreads?"
            )
            for i in range(len(self.warps)):
                place = (turn + i) % len(self.warps)
                if not self.waits(self.warps[place]):
                    self.issue(self.warps[place])
                    turn = place
                    break
            else:
                turn = (turn + 1) % len(self.warps)
            self.clock += 1
        half = TRIPS // 2
        clocks = max((w.ends[-1] - w.ends[half - 1]) / (len(w.ends) - half) for w in self.warps)
        return len(self.warps) * sum(step.ideal for step in self.steps) / clocks


def estimate(
    trip: Code, chip: Chip, blocks: int, warps: int, turns: bool = False
) -> tuple[float, float]:
    """(low, high) share of the peak, with `blocks` on an SM of `warps` warps on each quarter.

    Warpgroups may share the tensor core by turns (a queue of 1) or first come, first served (16),
    which is documented nowhere. With several blocks, the mean over four offsets between them.
    With `turns`, a block waits at a trip's first barrier in shared memory until the block before
    has arrived at the first that it arrives at; all other such barriers are passed at once.
    """
    queues = (1, 16) if any(map(sass.wgmma, trip)) else (16,)
    offsets = (0, 300, 700, 1100) if blocks > 1 else (0,)
    shares = []
    for queue in queues:
        settings = [Setting(blocks, warps, queue, offset, turns) for offset in offsets]
        shares.append(sum(_Quarter(trip, chip, s).share() for s in settings) / len(offsets))
    return min(shares), max(shares)
