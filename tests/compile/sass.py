"""Machine code as cuobjdump prints it: instructions, loops, a trip through the main loop, wgmmas.

All of it is read, with two choices: the main loop is, of the loops on tensor cores that hold no
other such loop, the one whose trip has most of these instructions; of equal ones the one with the
shortest trip, for tiles without a mask, which are the many, take less than those at an edge. And of
the ways through a loop, a trip is the shortest of those that run all products and asynchronous
copies that a trip can run: a loop's body also holds what most trips jump over.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction, and of its control code what a scheduler waits for."""

    address: int
    predicate: str  # "P0", "!P0", "UP1", or ""
    opcode: str
    operands: str
    stall: int  # clocks until the warp's next instruction
    write_barrier: int  # scoreboard that its result releases; 7: none
    read_barrier: int  # scoreboard that is released once its operands are read; 7: none
    wait: int  # bit mask of the scoreboards that it waits for

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        at = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(at[1], 16) if at and self.opcode.startswith("BRA") else None

    @property
    def goes_on(self) -> bool:
        """Whether the instruction after it may be the next."""
        # A branch's condition stands before it, or after the opcode: BRA P1, 0x10, BRA.DIV ~URZ, 0x10.
        conditional = self.predicate or re.match(r"!?U?P\d|~", self.operands)
        return bool(conditional) or not self.opcode.startswith(("BRA", "EXIT", "RET"))


Code = Sequence[Instruction]

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);"
    r"\s*/\* 0x[0-9a-f]+ \*/\s*\n\s*/\* 0x([0-9a-f]+) \*/",
    re.M,
)
# Class of an instruction: the first one whose opcodes it begins with.
_CLASSES = [
    ("mma", r"HMMA|HGMMA|UTC\w*MMA"),
    ("mufu", r"MUFU"),
    ("fp32", r"FFMA2?|FMUL2?|FADD2?"),
    ("max", r"FMNMX3?"),
    ("select", r"FSEL|FSETP|FSET|FCHK"),
    ("convert", r"F2F|F2FP|F2I|F2IP|I2F|I2FP|HADD2|HFMA2|HMUL2"),
    ("shared", r"LDSM|LDS|STSM|STS|ATOMS"),
    ("copy", r"LDGSTS|UTMALDG|UBLKCP"),
    ("global", r"LDG|STG|LD|ST|RED|REDG|ATOMG|ATOM"),
    ("local", r"LDL|STL"),
    ("shuffle", r"SHFL|VOTE|MATCH|REDUX"),
    (
        "sync",
        r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|MEMBAR|FENCE|NANOSLEEP|ARRIVES|CCTL|ERRBAR",
    ),
    ("control", r"BRA|BSSY|BSYNC|EXIT|CALL|RET|JMP|BREAK|YIELD|NOP|PLOP3|BMOV|UPLOP3"),
    ("constant", r"LDC|LDCU|ULDC|S2R|S2UR|CS2R|R2UR|UR2UP"),
    ("imad", r"IMAD"),
    ("int", r""),
]
_PATTERNS = [(name, re.compile(rf"(?:{p})(?:\.|$)" if p else "")) for name, p in _CLASSES]


@functools.cache
def kind(opcode: str) -> str:
    """The class: "mma", "fp32", "int", ..."""
    return next(name for name, pattern in _PATTERNS if pattern.match(opcode))


def instructions(sass: str) -> list[Instruction]:
    """All of one function, without the padding and the branch to itself at its end."""
    code = []
    for address, predicate, opcode, operands, encoding in _INSTRUCTION.findall(sass):
        control = int(encoding, 16) >> 41  # of the upper 64 bits
        code.append(
            Instruction(
                int(address, 16), predicate, opcode, operands.strip(),
                stall=control & 15,
                write_barrier=control >> 5 & 7,
                read_barrier=control >> 8 & 7,
                wait=control >> 11 & 63,
            )
        )  # fmt: skip
    return [x for x in code if x.opcode != "NOP" and x.target != x.address]


# --- loops ----------------------------------------------------------------------------------------


_PRODUCT = re.compile(r"(?:HMMA|HGMMA|UTC\w*MMA)\b")
_LOAD = re.compile(r"(?:LDG|LDGSTS|UTMALDG|UBLKCP)\b")


def loops(code: Code) -> list[list[Instruction]]:
    """Bodies of the loops: what lies before a branch backwards, from where it goes."""
    ends = {x.target: x.address for x in code if x.target is not None and x.target < x.address}
    return [[x for x in code if start <= x.address <= end] for start, end in ends.items()]


def main_loop(code: Code) -> list[Instruction]:
    """Its body; a kernel without tensor cores has the loop with the most loads; empty: no loop."""
    every = loops(code)
    # A trip seeks products and copies, but jumps over the loads of rows that may not be there.
    for wanted, ways in ((_PRODUCT, map(trip, every)), (_LOAD, every)):
        some = [
            (n, -len(way), body)
            for way, body in zip(ways, every)
            if (n := sum(wanted.match(x.opcode) is not None for x in way))
        ]
        inner = [x for x in some if not any(_holds(x[2], other[2]) for other in some)]
        if inner:
            return max(inner, key=lambda x: x[:2])[2]
    return []


def _holds(body: Code, other: Code) -> bool:
    return body[0].address < other[0].address and other[-1].address <= body[-1].address


def trip(body: Code) -> list[Instruction]:
    """What a trip through a loop's body runs."""
    if not body:
        return []
    index = {x.address: i for i, x in enumerate(body)}
    # instruction -> (-products and copies, instructions) of the best way to it, and from where
    best: dict[int, tuple[tuple[int, int], int]] = {0: ((0, 0), -1)}
    for i, x in enumerate(body):
        if i not in best:
            continue
        work, length = best[i][0]
        cost = (work - (kind(x.opcode) in ("mma", "copy")), length + 1)
        ways = [index[x.target]] if x.target in index else []
        if x.goes_on:
            ways.append(i + 1)
        for way in ways:
            if i < way < len(body) and (way not in best or cost < best[way][0]):
                best[way] = (cost, i)
    i, path = len(body) - 1, []
    while i in best:
        path.append(body[i])
        i = best[i][1]
    return path[::-1]


# --- products -------------------------------------------------------------------------------------


class Wgmma(NamedTuple):
    """A warpgroup's product: 64 x n x k, A from shared memory or from registers."""

    m: int
    n: int
    k: int
    shared_a: bool

    @property
    def shared_bytes(self) -> int:
        """Read of shared memory, 16-bit operands: B always, A where it lies there."""
        return 2 * self.k * (self.n + (self.m if self.shared_a else 0))


def wgmma(x: Instruction) -> Wgmma | None:
    if not x.opcode.startswith("HGMMA"):
        return None
    m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", x.opcode).groups())
    return Wgmma(m, n, k, _register_operand(x) is None)


def _register_operand(x: Instruction) -> int | None:
    """The first of the four registers that a wgmma reads its left operand from."""
    operand = re.match(r"R\d+, R(\d+), gdesc", x.operands)
    return int(operand[1]) if operand and x.opcode.startswith("HGMMA") else None


def product_flop(x: Instruction) -> float:
    """Of one warp; of a warpgroup's product, its quarter."""
    if w := wgmma(x):
        return 2 * w.m * w.n * w.k / 4
    if x.opcode.startswith("HMMA.16816"):
        return 4096
    return 2048 if x.opcode.startswith("HMMA.1688") else 0


def shared_bytes(opcode: str) -> int:
    """What a warp's access moves: LDSM and STSM by their matrices, others by their width."""
    if opcode.startswith(("LDSM", "STSM")):
        return 512 if opcode.endswith(".4") else 256 if opcode.endswith(".2") else 128
    return 512 if ".128" in opcode else 256 if ".64" in opcode else 128


# --- two checks of wgmmas that no test on a CPU makes ---------------------------------------------


def serialised(code: Code) -> int:
    """Wgmmas that wait for the one before: ptxas's C7510, C7515 and their like.

    Products of one tile are a group, of which only the last one commits. Where ptxas cannot tell
    the registers of several in flight apart, it waits for each: each is a group of its own.
    """
    products = [x for x in code if x.opcode.startswith("HGMMA")]
    if any(not _commits(x) for x in products):
        return 0
    return len(products) if len(products) > 2 else 0


def _commits(x: Instruction) -> bool:
    return x.opcode.startswith("HGMMA") and "gsb0" in x.operands


def overwritten_operands(
    code: Code, heed_waits: bool = True
) -> list[tuple[Instruction, Instruction]]:
    """Wgmmas whose left operand is overwritten in its registers too early, with what does it.

    A wgmma reads these registers after it is issued (triton-lang/triton#9433, #11781: ptxas before
    13.3). From each, every way through the code is followed, a loop's way back too, up to a
    WARPGROUP.DEPBAR that its group has to pass; a write to one of its registers before is found,
    one a way. Groups are counted along a way, so a wait that is a no-op does not count. Not seen: a
    wgmma that accumulates into another's operand, and calls. `heed_waits=False` goes past the
    waits, and then has to find something.
    """
    index = {x.address: i for i, x in enumerate(code)}
    jumps = [index.get(x.target) if x.target is not None else None for x in code]
    written = [_written(x) for x in code]
    commits = [_commits(x) for x in code]
    left_open = [_groups_left_open(x) if heed_waits else None for x in code]
    found = []
    for i, x in enumerate(code):
        if (first := _register_operand(x)) is None:
            continue
        registers = set(range(first, first + 4))
        # (where, whether its group is committed, groups committed since)
        todo, seen = [(i + 1, commits[i], 0)], set()
        while todo:
            at, committed, later = todo.pop()
            while at < len(code) and (at, committed, later) not in seen:
                seen.add((at, committed, later))
                allowed = left_open[at]
                if committed and allowed is not None and later >= allowed:
                    break
                if commits[at]:
                    committed, later = True, min(later + committed, 8)
                if written[at] & registers:
                    found.append((x, code[at]))
                    break
                if (jump := jumps[at]) is not None:
                    todo.append((jump, committed, later))
                if not code[at].goes_on:
                    break
                at += 1
    return found


def _groups_left_open(x: Instruction) -> int | None:
    """Of a wait for wgmmas, how many groups may stay in flight."""
    wait = x.opcode.startswith("WARPGROUP.DEPBAR") and re.match(r"gsb0, 0x(\w+)", x.operands)
    return int(wait[1], 16) if wait else None


# Opcodes whose first register is read, or that write no vector register.
_NO_RESULT = (
    "ST", "RED", "BRA", "BAR", "HGMMA", "SYNCS", "WARP", "UTM", "EXIT", "ISETP", "FSETP", "R2UR",
    "UIADD", "ATOMS.", "BSYNC", "BSSY", "NANOSLEEP", "CCTL", "DEPBAR", "UMOV", "ULEA", "USHF",
    "R2P", "PLOP", "VOTEU", "ELECT", "UBLKRED",
)  # fmt: skip


def _written(x: Instruction) -> set[int]:
    """The vector registers that it writes."""
    result = re.match(r"(?:P\w+, )?R(\d+)", x.operands)
    if not result or x.opcode.startswith(_NO_RESULT):
        return set()
    if x.opcode.startswith("LDSM"):
        count = {"4": 4, "2": 2}.get(x.opcode[-1], 1)
    elif ".128" in x.opcode:
        count = 4
    elif ".64" in x.opcode or x.opcode.startswith("IMAD.WIDE") or x.opcode == "CS2R":
        count = 2
    else:
        count = 1
    return set(range(int(result[1]), int(result[1]) + count))
