"""Arguments of the Gluon forward's functions, in groups, and a packed sequence's place."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Kind(NamedTuple):
    """The constants of a kernel."""

    D: gl.constexpr  # of q and k: the box, a power of two
    WIDTH: gl.constexpr  # of D, the columns that are multiplied
    DV: gl.constexpr
    CONSUMERS: gl.constexpr  # 2 or 3
    BM: gl.constexpr  # queries of a consumer
    BN: gl.constexpr  # keys of a tile
    STAGES: gl.constexpr
    LEFT: gl.constexpr  # whether the band has this side
    RIGHT: gl.constexpr
    SCALED: gl.constexpr  # scores are scaled one by one, before the maximum
    CAPPED: gl.constexpr
    SLOPED: gl.constexpr  # ALiBi
    BOUNDED: gl.constexpr  # a tile may read what lies beyond the keys
    PACKED: gl.constexpr
    EARLY: gl.constexpr  # the turn is handed on after S, and O scaled in the next trip


class Ring(NamedTuple):
    """Shared memory of keys and values, and its barriers."""

    k: Any
    v: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    turn: Any  # of each consumer, to multiply
    clean: Any  # no value beyond the keys is left, if BOUNDED


class Rule(NamedTuple):
    """How a head's scores come about; all to base 2."""

    inner: Any  # of the products, if CAPPED: 2 / cap of their scale
    scale: Any  # of the scores; if CAPPED the cap
    slope: Any
    corner: Any  # seqlen_k - seqlen_q
    low: Any  # query i sees the keys from i + low
    high: Any  # to i + high
    keys: Any  # how many


class Place(NamedTuple):
    """The part of the scores that a program has."""

    batch: Any
    head: Any
    kv_head: Any
    start_q: Any  # of the sequence, in the packed tensors
    start_k: Any
    query: Any  # the first
    tile: Any  # the first tile of keys
    tiles: Any  # how many


class Results(NamedTuple):
    """Where the results go."""

    lse: Any  # the pointer of this head's query 0
    out: Any  # descriptor
    smem: Any  # on the way to it
    out_ptr: Any  # of this head's query 0, if PACKED
    stride: Any  # of a query in it
    width: Any  # columns
    queries: Any  # how many


@gluon.jit
def length(cu_seqlens, used, sequence):
    """(first token, how many) of a packed sequence."""
    start = gl.load(cu_seqlens + sequence).to(gl.int32)
    tokens = gl.load(cu_seqlens + sequence + 1).to(gl.int32) - start
    if used is not None:
        tokens = gl.minimum(tokens, gl.load(used + sequence).to(gl.int32))
    return start, gl.maximum(tokens, 0)
