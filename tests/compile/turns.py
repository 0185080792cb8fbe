"""Modelled: the time that the Gluon backward of attention spends because additions to dQ take turns.

    python tests/compile/turns.py                    # the table of docs/hopper.md

A GPU starts programs by their number, one on a multiprocessor, and a program waits only for those
of lower numbers: so one pass over the programs in this order gives all times. Not in it: other
traffic of the L2, masked tiles, clocks.
"""

from __future__ import annotations

import heapq
import itertools

MULTIPROCESSORS = 132
KEYS, QUERIES = 128, 64  # of a tile
TOKENS, HEADS = 16384, 16  # of a batch; and of one sequence
TOGETHER = 8  # heads whose key tiles start in turn
# Clocks, at head_dim 128. A trip is 2560 of products at 80 % of the peak; the others are assumed.
TRIP = 3200
ENDS = 4000  # before the first trip of a program and after its last one
READ = 1024  # until an addition has left shared memory: 32 KB at 32 bytes a clock
WRITTEN = 300  # until its last bytes are acknowledged
SEEN = 400  # from there until the next program knows


def clocks(seqlen: int, heads: int, causal: bool, turns: bool, together: int = TOGETHER) -> float:
    """Of a launch over so many heads, of all sequences."""
    free = [0.0] * MULTIPROCESSORS
    tiles = -(-seqlen // QUERIES)
    for begin in range(0, heads, together):
        # When the next program may add to a tile of queries of a head.
        turn = [[0.0] * tiles for _ in range(min(together, heads - begin))]
        for key, of_head in itertools.product(range(-(-seqlen // KEYS)), turn):
            now = adder = empty = heapq.heappop(free) + ENDS / 2
            for tile in reversed(range(key * KEYS // QUERIES if causal else 0, tiles)):
                now = max(now + TRIP, empty)
                empty = max(now, adder, of_head[tile] if turns else 0) + READ
                adder = empty + (WRITTEN if turns else 0)
                of_head[tile] = adder + SEEN
            heapq.heappush(free, max(now, adder) + ENDS / 2)
    return max(free)


def cost(seqlen: int, heads: int, causal: bool) -> float:
    """The time with turns over that without, less 1."""
    return clocks(seqlen, heads, causal, True) / clocks(seqlen, heads, causal, False) - 1


def table() -> str:
    lines = ["| tokens of a sequence | 16 384 tokens | causal | one sequence | causal |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
        batches = (HEADS * TOKENS // seqlen, HEADS)
        costs = [cost(seqlen, heads, causal) for heads in batches for causal in (False, True)]
        lines.append(f"| {seqlen} | {' | '.join(f'{x:.0%}' for x in costs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
