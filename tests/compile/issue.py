"""How many instructions a trip through a kernel's main loop issues, read from its machine code.

A loop's body (offline.py) also holds what most trips jump over: a mask at the band's edge, copies of
rows that are not aligned. The trip counted here is the shortest one that runs all the tensor core
instructions and asynchronous copies that a trip can run.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Counts = dict[str, int]

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
# A branch's condition stands before it, or behind the opcode: BRA P1, 0x10, BRA.DIV ~URZ, 0x10.
CONDITION = re.compile(r"^\s*(?:!?U?P\d|~)")


class _Instruction(NamedTuple):
    opcode: str
    conditional: bool
    target: int | None  # of a branch


def trip(sass: str) -> Counts | None:
    """Of the innermost loop with the most tensor core instructions; None if no loop has any."""
    code: dict[int, _Instruction] = {}
    for at, predicate, opcode, rest in INSTRUCTION.findall(sass):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
        conditional = bool(predicate) or bool(CONDITION.match(rest))
        code[int(at, 16)] = _Instruction(opcode, conditional, target and int(target[1], 16))
    loops = [(x.target, at) for at, x in code.items() if x.target is not None and x.target < at]
    found = {loop: _shortest(code, *loop) for loop in loops}
    wanted = [loop for loop in loops if found[loop][1]]
    trips = [
        found[start, end]
        for start, end in wanted
        if not any(start < s and e <= end for s, e in wanted)
    ]
    if not trips:
        return None
    instructions, tensor_core = max(trips, key=lambda x: (x[1], -x[0]))
    return {"instructions": instructions, "tensor core": tensor_core}


def _shortest(code: dict[int, _Instruction], start: int, end: int) -> tuple[int, int]:
    """(instructions, those of tensor cores) from a loop's start to the branch at its end."""
    body = [at for at in sorted(code) if start <= at <= end]
    best = {start: (0, 0, 0)}  # on reaching it: wanted (negated), instructions, tensor core
    for at, after in zip(body, [*body[1:], end]):
        if at not in best:
            continue
        instruction = code[at]
        tensor_core = instruction.opcode.startswith("HMMA")
        wanted = tensor_core or instruction.opcode.startswith("LDGSTS")
        before = best[at]
        here = (before[0] - wanted, before[1] + 1, before[2] + tensor_core)
        if at == end:
            return here[1], here[2]
        ways = [instruction.target] if instruction.target is not None else []
        if instruction.conditional or instruction.target is None:
            ways.append(after)
        for way in ways:
            if at < way <= end:
                best[way] = min(best.get(way, here), here)
    return 0, 0
