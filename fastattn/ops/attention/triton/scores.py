"""What forward and backward kernels share: tiles of memory, the scores of a tile, its dropout.

An optional tensor that a call does not have arrives in a kernel as None, and the code for it is not
compiled. Positions i of queries and j of keys count inside the sequence, and come as a column and a
row: (BLOCK_M, 1) and (1, BLOCK_N) where tiles are queries by keys, the other way round where they
are keys by queries. Every helper works for both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops.attention import tiles

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PART_STEP = tl.constexpr(tiles.MAX_BLOCK_N)  # parts end where key tiles do


@triton.jit
def load_tile(
    base,
    offsets,  # (ROWS,) of the rows, in elements
    inside,  # (ROWS,) rows that exist, the others read as zero; None if all do
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A (ROWS, BLOCK_D) tile; columns past HEAD_DIM read as zero."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + (offsets[:, None] + columns[None, :])
    if inside is not None:
        exists = inside[:, None]
        if HEAD_DIM != BLOCK_D:
            exists = exists & (columns < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=exists, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    base,
    tile,  # (ROWS, BLOCK_D), cast to the pointer's type
    offsets,
    inside,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    exists = inside[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = base + (offsets[:, None] + columns[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=exists)


@triton.jit
def held(lengths_ptr, batch, most, seqlen_new):
    """Tokens of a sequence, of which `seqlen_new` are not in `lengths` yet: from 0 to `most`.

    Counted in 64 bits, so that wrong contents are cut to the tensor before they can wrap.
    """
    before = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int64), most)
    return tl.minimum(tl.maximum(before + seqlen_new, 0), most).to(tl.int32)


@triton.jit
def part_length(keys, splits, split_length):
    """Keys of a part of a sequence: of `split_length` or more, so that there are at most `splits`.

    It follows from the sequence's own length, and so do the bits of its result.
    """
    even = tl.cdiv(tl.cdiv(keys, splits), PART_STEP) * PART_STEP
    return tl.maximum(even, split_length)


@triton.jit
def parts_of(keys, splits, split_length):
    """Parts of a sequence; one of a sequence without keys."""
    return tl.maximum(tl.cdiv(keys, part_length(keys, splits, split_length)), 1)


@triton.jit
def sequence(cu_seqlens_ptr, seqused_ptr, batch, seqlen):
    """(first token, tokens) of a sequence; `seqlen` is that of a padded tensor, or a packed total.

    Contents that point outside of the tensor are cut to it: nothing is read there.
    """
    start = tl.cast(0, tl.int64)
    length = seqlen
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), seqlen)
        stop = tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64)
        length = (tl.minimum(tl.maximum(stop, start), seqlen) - start).to(tl.int32)
    if seqused_ptr is not None:
        length = held(seqused_ptr, batch, length, 0)
    return start, length


@triton.jit
def gap(cu_seqlens_ptr, batch, batch_size, start, covered, tokens):
    """(first, end) of the packed tokens after a sequence's own that no sequence has.

    They reach from `covered` tokens of it, which its tiles or seqused leave, to the next sequence,
    or to the end of the tensor.
    """
    first = start + covered
    stop = tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64)
    stop = tl.where(batch + 1 == batch_size, tokens, tl.minimum(stop, tokens))
    return first, tl.maximum(first, stop)


@triton.jit
def clear_rows(
    ptr,  # (tokens, heads, head_dim), contiguous
    first,  # token
    end,
    tile,  # of `tiles`, which share the tokens
    tiles,
    heads,
    head,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zero a head's rows of the tokens from `first` to `end`, this tile's share of them."""
    columns = tl.arange(0, BLOCK_D)
    for n in range(first + tile * ROWS, end, tiles * ROWS):
        token = n + tl.arange(0, ROWS)
        pointers = ptr + ((token * heads + head) * HEAD_DIM)[:, None] + columns[None, :]
        exists = (token < end)[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(pointers, tl.zeros((ROWS, BLOCK_D), ptr.dtype.element_ty), mask=exists)


# tanh(x) for |x| < 0.625 as x + x^3 P(x^2), P fitted to a relative error of 5e-9.
_TANH_0 = tl.constexpr(-0.33333278)
_TANH_1 = tl.constexpr(0.13331331)
_TANH_2 = tl.constexpr(-0.05373001)
_TANH_3 = tl.constexpr(0.02060618)
_TANH_4 = tl.constexpr(-0.00566697)


@triton.jit
def tanh(x):
    """To float32's precision also near zero, where 1 - 2 / (e^2x + 1) cancels."""
    square = x * x
    p = square * _TANH_4 + _TANH_3
    p = p * square + _TANH_2
    p = p * square + _TANH_1
    p = p * square + _TANH_0
    near = x + x * square * p
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def score_tile(
    products,  # q k^T of the tile
    i,  # query positions
    j,  # key positions
    rows_inside,  # queries that exist, like i
    key_limit,  # keys from here on are padding
    low,  # query i sees the keys j >= i + low; None for no bound
    high,  # query i sees the keys j <= i + high; None for no bound
    shift,  # of the diagonal, seqlen_k - seqlen_q, for ALiBi
    first_key,  # keys before it are hidden; None for none
    mask_corner,  # pointer to the mask at the tile's first query and key; or None, as all below
    mask_rows,  # offsets of its rows from there, like i
    mask_columns,  # and of its columns, like j
    bias_corner,
    bias_rows,
    bias_columns,
    slope,  # of ALiBi, times log2(e), like i or a scalar
    q_documents,  # like i
    k_documents_ptr,  # at key 0
    pattern_rows,  # pointers to rows of a tile of the block mask's patterns, like i
    pattern_columns,  # columns of that tile, like j
    scale,  # softmax_scale, times log2(e) if there is no softcap; None for 1
    softcap,  # None for none
    BOUNDARY: tl.constexpr,
    CHECK_KEYS: tl.constexpr,  # keys of the tile may be padding
):
    """(scores in units of log2(e), the softcap's derivative if there is one); -inf where unseen.

    Tiles inside the band and the key limit (not BOUNDARY) need no comparison of positions.
    """
    slope_of_cap = products  # of no meaning without a softcap
    if softcap is not None:
        saturation = tanh(products * (scale / softcap))
        scores = saturation * (softcap * LOG2_E)
        slope_of_cap = 1.0 - saturation * saturation
    else:
        scores = products if scale is None else products * scale
    if slope is not None:
        scores -= slope * tl.abs(i + shift - j).to(tl.float32)
    exists = rows_inside
    if CHECK_KEYS:
        exists = rows_inside & (j < key_limit)
    if bias_corner is not None:
        bias = tl.load(bias_corner + (bias_rows + bias_columns), mask=exists, other=0.0)
        bias = bias.to(tl.float32)
        scaled = bias * LOG2_E
        # A finite bias stays finite: masks made of the smallest float32 hide, but not a whole row.
        scaled = tl.where((scaled == float("-inf")) & (bias != float("-inf")), -3.4e38, scaled)
        scores += scaled
    if BOUNDARY:
        seen = j < key_limit
        if high is not None:
            seen = seen & (j <= i + high)
        if low is not None:
            seen = seen & (j >= i + low)
        if first_key is not None:
            seen = seen & (j >= first_key)
        scores = tl.where(seen, scores, float("-inf"))
    if mask_corner is not None:
        allowed = tl.load(mask_corner + (mask_rows + mask_columns), mask=exists, other=0)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    if q_documents is not None:
        k_documents = tl.load(k_documents_ptr + j, mask=j < key_limit, other=0)
        scores = tl.where(q_documents == k_documents, scores, float("-inf"))
    if pattern_rows is not None:
        allowed = tl.load(pattern_rows + pattern_columns)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    return scores, slope_of_cap


_LARGEST = tl.constexpr(268435456.0)  # 2^28


@triton.jit
def exact_beyond(
    unscaled,  # (BLOCK_M,) the highest product of the tile
    highest,  # unscaled * scale, rounded
    top,  # what is subtracted of the scaled products, at least `highest`
    scale,
    power,  # the power of two from scale on
):
    """(scale, top) of each row, such that products * scale - top is never much above 0.

    The compiler makes one instruction of it, which rounds once. So it holds what the rounding of
    top left out: up to 8 where |top| is below 2^28, a common factor of numerator and denominator;
    but hundreds beyond it, where 2^x overflows. There the products of float32 are so far apart
    that no weight but the highest one is above 2^-16, whatever the scale: a power of two makes
    the highest product exact.
    """
    exact = unscaled * power
    huge = (tl.abs(highest) > _LARGEST) & (tl.abs(exact) < float("inf"))
    return tl.where(huge, power, scale), tl.where(huge, exact + (top - highest), top)


@triton.jit
def row_state(lse_ptr, delta_ptr, line, rows, rows_left):
    """(lse in base 2, delta) of a tile's rows; those past the end or without a key get p = 0."""
    inside = rows < rows_left
    lse = tl.load(lse_ptr + line + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + line + rows, mask=inside, other=0.0)
    blind = lse == float("-inf")  # its delta may be infinite, as the gradient of such an LSE is
    return tl.where(blind, float("inf"), lse) * LOG2_E, tl.where(blind, 0.0, delta)


@triton.jit
def keep_tile(
    seed,  # int64
    plane,  # batch * heads + head, like i or a scalar
    i,
    first_key,  # of the tile, a multiple of 4
    threshold,  # of dropout.threshold
    BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,  # the tile is keys by queries
):
    """Which weights of a tile dropout keeps; `ops/attention/dropout.py` says by what rule."""
    quads = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    if KEYS_FIRST:
        quads = quads[:, None]
    else:
        quads = quads[None, :]
    zero = (i + quads) * 0
    row = (zero + i).to(tl.uint32)
    quad = (zero + quads).to(tl.uint32)
    planes = (zero + plane).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, row, quad, planes, zero.to(tl.uint32))
    # (..., 2, 2) with word 2 a + b at [a, b], then next to each other along the keys.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if KEYS_FIRST:
        words = tl.permute(words, (0, 2, 3, 1))
        words = tl.reshape(words, (BLOCK_N, words.shape[3]))
    else:
        words = tl.reshape(words, (words.shape[0], BLOCK_N))
    return words.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def key_range(
    first_row,  # the first query of a tile
    last_row,  # the last one
    begin,  # no key before it
    end,  # and none from it on
    low,
    high,
    BLOCK_N: tl.constexpr,
    LEFT_EDGE: tl.constexpr,  # positions hide keys on the left: a band's, or those before `begin`
):
    """(start, whole_start, whole_end, end): key tiles that a query tile has to visit.

    Every query of the tile sees all keys of the tiles from whole_start to whole_end; the band's
    edges and the key limit cross the tiles around them only. Without LEFT_EDGE, `begin` is where
    documents or a split begin, and whole_start is start.
    """
    whole_start = begin
    whole_end = end
    if high is not None:
        end = tl.minimum(end, last_row + high + 1)
        whole_end = tl.minimum(whole_end, first_row + high + 1)
    if low is not None:
        begin = tl.maximum(begin, first_row + low)
        whole_start = tl.maximum(whole_start, last_row + low)
    begin = tl.maximum(begin, 0)
    start = begin // BLOCK_N * BLOCK_N
    end = tl.where(begin < end, end, start)
    if LEFT_EDGE:
        whole_start = tl.cdiv(tl.maximum(whole_start, 0), BLOCK_N)
        whole_start = tl.minimum(whole_start, tl.cdiv(end, BLOCK_N))
        whole_start = tl.maximum(whole_start * BLOCK_N, start)
    else:
        whole_start = start
    whole_end = tl.maximum(tl.maximum(whole_end, 0) // BLOCK_N * BLOCK_N, whole_start)
    return start, whole_start, whole_end, end
