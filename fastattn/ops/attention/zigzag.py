"""How a sequence lies on the processes of a ring, and what of its scores each pair of parts has.

A sequence is cut into 2 R pieces of one length; process r of R holds the pieces r and 2 R - 1 - r,
so that under a causal mask all processes compute as much (Llama 3, arXiv:2407.21783, 3.3.2). On 2
processes, with the pieces 0 and 3 on the first, 1 and 2 on the second, the blocks of the scores:

    keys      0 1 2 3
    query 0   \\                 \\ causal, # whole
    query 1   # \\
    query 2   # # \\
    query 3   # # # \\
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

WHOLE = slice(None)


class Block(NamedTuple):
    """Queries `rows` of one part on keys `columns` of another: one call of attention."""

    rows: slice
    columns: slice
    causal: bool = False
    window: tuple[int, int] | None = None


def pieces(rank: int, size: int) -> tuple[int, int]:
    """The numbers of the two pieces that a process holds, in the order in which it holds them."""
    return rank, 2 * size - 1 - rank


def places(
    rank: int, size: int, length: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """The positions of a process's part in a sequence of `length`: (length / size,), int64.

    >>> places(0, 2, 8)
    tensor([0, 1, 6, 7])
    """
    piece = length // (2 * size)
    inner = torch.arange(piece, device=device)
    return torch.cat([inner + number * piece for number in pieces(rank, size)])


def blocks(
    rank: int,
    source: int,
    size: int,
    piece: int,
    causal: bool,
    window: tuple[int, int] | None,
) -> list[Block]:
    """What the queries of process `rank` see of the keys of `source`; disjoint, none is empty.

    Args:
        piece: the number of tokens in a piece.
        window: (left, right) as `attention`'s, -1 for no bound.
    """
    left, right = window or (-1, -1)
    right = 0 if causal else right
    if left < 0 and right < 0:
        return [Block(WHOLE, WHOLE)]
    if left < 0 and causal:  # one call, which a kernel fills better than four
        if source == rank:
            return [Block(WHOLE, WHOLE, causal=True)]  # the pieces are in order
        if source < rank:
            return [Block(WHOLE, slice(0, piece))]
        return [Block(slice(piece, 2 * piece), WHOLE)]
    found = []
    for i, of_queries in enumerate(pieces(rank, size)):
        for j, of_keys in enumerate(pieces(source, size)):
            block = _band((of_queries - of_keys) * piece, piece, left, right)
            if block is not None:
                rows, columns, inner = block
                found.append(
                    Block(_moved(rows, i * piece), _moved(columns, j * piece), False, inner)
                )
    return found


def _band(
    ahead: int, piece: int, left: int, right: int
) -> tuple[slice, slice, tuple[int, int] | None] | None:
    """The part of a square of scores in which a window lies, and the window inside of it.

    Query a, `ahead` positions after key 0, sees the keys low <= b - a <= high. A corner of the
    square that has none of them is cut off, so that the diagonal is inside and attention can say
    the rest.
    """
    low = -math.inf if left < 0 else ahead - left
    high = math.inf if right < 0 else ahead + right
    if low >= piece or high <= -piece:
        return None
    keys, queries = int(max(0, low)), int(max(0, -high))  # at least one of them is 0
    side, shift = piece - keys - queries, queries - keys
    inner = tuple(
        -1 if bound >= side - 1 else int(bound) for bound in (-(low + shift), high + shift)
    )
    rows, columns = slice(queries, piece - keys), slice(keys, piece - queries)
    return rows, columns, None if inner == (-1, -1) else (inner[0], inner[1])


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
