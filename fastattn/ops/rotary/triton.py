"""The Triton kernels of `rotary`: q and k in one launch, forward and backward.

A program has some heads of one token, of q or of k, and keeps them in registers: first and second
elements of the pairs, and the rest of the head. With u = x * rstd and y = u * (weight + offset)

    first = y_a * cos_a - y_b * sin_a,    second = y_b * cos_b + y_a * sin_b

where (a, b) are the two elements of a pair, whose angles may differ. The gradient turns back:

    dy_a = dfirst * cos_a + dsecond * sin_b,    dy_b = dsecond * cos_b - dfirst * sin_a
    g = dy * (weight + offset),    dx = (g - u * mean(g * u)) * rstd,    dweight = sum of dy * u

All arithmetic is float32. Sums for the weights go in a fixed order, for they have two stages: every
program adds up its own tokens, then the programs are added up. Not supported: float64, gradients of
cos and sin, and gradients of gradients (registration.py takes those from the reference).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastattn import chips
from fastattn.ops.common import launch
from fastattn.ops.common.matrices import dense
from fastattn.ops.rotary import results, tiles
from fastattn.ops.rotary.problem import RotaryProblem


def unsupported(problem: RotaryProblem) -> str | None:
    if problem.transformed:
        return "the kernels have no forward-mode or batching rule"
    if problem.angles_need_grad:
        return "the kernels have no gradient for cos and sin"
    if torch.float64 in problem.dtypes:
        return "the kernels compute in float32: float64 would lose precision"
    if problem.head_dim > tiles.MAX_HEAD_DIM:
        return f"the kernels take a head_dim up to {tiles.MAX_HEAD_DIM}; got {problem.head_dim}"
    return None


# --- heads in registers ---------------------------------------------------------------------------


@triton.jit
def _load_heads(
    ptr, row, inside, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """(first, second, rest) of the heads at `row`, in float32; 0 outside of them."""
    if INTERLEAVED:  # contiguous, so that loads are wide
        column = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(ptr + (row + column), mask=inside & (column < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(x, (row.shape[0], PAIRS, 2)))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        mask = inside & (column < HALF)
        first = tl.load(ptr + (row + column), mask=mask, other=0.0)
        second = tl.load(ptr + (row + HALF + column), mask=mask, other=0.0)
    rest = first
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        rest = tl.load(ptr + (row + column), mask=inside & (column < HEAD_DIM), other=0.0)
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


@triton.jit
def _store_heads(
    ptr, row, inside, first, second, rest, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    dtype = ptr.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (row.shape[0], 2 * PAIRS))
        tl.store(ptr + (row + column), x, mask=inside & (column < 2 * HALF))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        mask = inside & (column < HALF)
        tl.store(ptr + (row + column), first.to(dtype), mask=mask)
        tl.store(ptr + (row + HALF + column), second.to(dtype), mask=mask)
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        tl.store(ptr + (row + column), rest.to(dtype), mask=inside & (column < HEAD_DIM))


@triton.jit
def _load_angles(
    ptr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr
):
    """Of the first and of the second elements of the pairs, (1, PAIRS) each."""
    pair = tl.arange(0, PAIRS)[None, :]
    first = pair
    if FULL and INTERLEAVED:
        first = 2 * pair
    of_first = tl.load(ptr + first, mask=pair < HALF, other=0.0).to(tl.float32)
    of_second = of_first
    if FULL:
        second = first + (1 if INTERLEAVED else HALF)
        of_second = tl.load(ptr + second, mask=pair < HALF, other=0.0).to(tl.float32)
    return of_first, of_second


@triton.jit
def _load_weight(
    ptr, offset, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """(first, second, rest) of weight + offset, one row each."""
    first, second = _load_angles(ptr, HALF, True, INTERLEAVED, PAIRS)
    rest = first
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        rest = tl.load(ptr + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32) + offset
    return first + offset, second + offset, rest


@triton.jit
def _sum_of_products(a_first, b_first, a_second, b_second, a_rest, b_rest, REST: tl.constexpr):
    """Over each head, (heads, 1)."""
    total = tl.sum(a_first * b_first, 1, keep_dims=True)
    total += tl.sum(a_second * b_second, 1, keep_dims=True)
    if REST > 0:
        total += tl.sum(a_rest * b_rest, 1, keep_dims=True)
    return total


@triton.jit
def _of_token(
    token, cos_ptr, sin_ptr, positions_ptr, cos_batch, cos_row, sin_batch, sin_row,
    positions_batch, positions_token, seqlen, table_rows,
):  # fmt: skip
    """(batch, position in the sequence, pointer to cos, pointer to sin)."""
    b = token // seqlen
    t = token % seqlen
    row = t
    if positions_ptr is not None:
        row = tl.load(positions_ptr + b * positions_batch + t * positions_token).to(tl.int64)
        row = tl.maximum(tl.minimum(row, table_rows - 1), 0)
    return b, t, cos_ptr + b * cos_batch + row * cos_row, sin_ptr + b * sin_batch + row * sin_row


# --- the rotation ---------------------------------------------------------------------------------


@triton.jit
def _turn_heads(
    x_ptr, weight_ptr, out_ptr, cos_ptr, sin_ptr, x_head, out_head, group, heads, eps, offset,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The heads of one group, of q or of k: their norm, if there is a weight, and the rotation."""
    head = group * HEADS + tl.arange(0, HEADS)[:, None]
    inside = head < heads
    head = head.to(tl.int64)
    first, second, rest = _load_heads(
        x_ptr, head * x_head, inside, HEAD_DIM, HALF, INTERLEAVED, PAIRS, REST
    )
    if weight_ptr is not None:
        squares = _sum_of_products(first, first, second, second, rest, rest, REST)
        rstd = tl.rsqrt(squares / HEAD_DIM + eps)
        w_first, w_second, w_rest = _load_weight(
            weight_ptr, offset, HEAD_DIM, HALF, INTERLEAVED, PAIRS, REST
        )
        first *= rstd * w_first
        second *= rstd * w_second
        if REST > 0:
            rest *= rstd * w_rest
    cos_first, cos_second = _load_angles(cos_ptr, HALF, FULL, INTERLEAVED, PAIRS)
    sin_first, sin_second = _load_angles(sin_ptr, HALF, FULL, INTERLEAVED, PAIRS)
    if BACK:
        turned = first * cos_first + second * sin_second
        second = second * cos_second - first * sin_first
    else:
        turned = first * cos_first - second * sin_first
        second = second * cos_second + first * sin_second
    _store_heads(
        out_ptr, head * out_head, inside, turned, second, rest, HEAD_DIM, HALF, INTERLEAVED, PAIRS,
        REST,
    )  # fmt: skip


_NEVER_SPECIALISED = ["seqlen", "heads", "kv_heads", "groups", "table_rows", "tokens"]


@triton.jit(do_not_specialize=[x for x in _NEVER_SPECIALISED if x != "tokens"])
def _rotate_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    q_out_batch, q_out_token, q_out_head, k_out_batch, k_out_token, k_out_head,
    cos_batch, cos_row, sin_batch, sin_row, positions_batch, positions_token,
    seqlen, heads, kv_heads, groups, table_rows, eps, offset,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token a program: the first `groups` groups are q's, then come k's."""
    group = tl.program_id(1)
    b, t, cos_ptr, sin_ptr = _of_token(
        tl.program_id(0).to(tl.int64), cos_ptr, sin_ptr, positions_ptr, cos_batch, cos_row,
        sin_batch, sin_row, positions_batch, positions_token, seqlen, table_rows,
    )  # fmt: skip
    if group < groups:
        _turn_heads(
            q_ptr + b * q_batch + t * q_token, q_weight_ptr,
            q_out_ptr + b * q_out_batch + t * q_out_token, cos_ptr, sin_ptr, q_head, q_out_head,
            group, heads, eps, offset, HEAD_DIM, HALF, FULL, INTERLEAVED, BACK, HEADS, PAIRS, REST,
        )  # fmt: skip
    else:
        _turn_heads(
            k_ptr + b * k_batch + t * k_token, k_weight_ptr,
            k_out_ptr + b * k_out_batch + t * k_out_token, cos_ptr, sin_ptr, k_head, k_out_head,
            group - groups, kv_heads, eps, offset, HEAD_DIM, HALF, FULL, INTERLEAVED, BACK, HEADS,
            PAIRS, REST,
        )  # fmt: skip


def forward(
    q: torch.Tensor,  # (batch, seqlen, heads, head_dim)
    k: torch.Tensor,  # (batch, seqlen, kv_heads, head_dim)
    cos: torch.Tensor,  # (positions, width) or (batch or 1, seqlen, width)
    sin: torch.Tensor,
    positions: torch.Tensor | None,  # (batch or 1, seqlen) or (seqlen,)
    q_weight: torch.Tensor | None,  # (head_dim,)
    k_weight: torch.Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    eps: float,
    weight_offset: float,
    *,
    back: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated; `back`: by the angles' negative, the gradient of a rotation."""
    outs = results.like(q), results.like(k)
    (batch, seqlen, heads, head_dim), kv_heads = q.shape, k.shape[2]
    q, k = _by_heads(q), _by_heads(k)
    tile = tiles.forward(head_dim, rotary_dim, max(heads, kv_heads))
    angles, angle_strides, switches = _angles(cos, sin, positions, q, rotary_dim, interleaved, tile)
    groups = triton.cdiv(heads, tile.heads)
    launch.launch(
        _rotate_kernel, (batch * seqlen, groups + triton.cdiv(kv_heads, tile.heads)),
        q, k, dense(q_weight), dense(k_weight), *angles, *outs,
        *q.stride()[:3], *k.stride()[:3], *outs[0].stride()[:3], *outs[1].stride()[:3],
        *angle_strides, seqlen, heads, kv_heads, groups, cos.shape[-2], eps, weight_offset,
        BACK=back, **switches,
    )  # fmt: skip
    return outs


# --- the backward with a norm ---------------------------------------------------------------------


@triton.jit
def _head_gradients(
    dout_ptr, x_ptr, weight_ptr, dx_ptr, partials_ptr, cos_ptr, sin_ptr, positions_ptr,
    dout_batch, dout_token, dout_head, x_batch, x_token, x_head, dx_batch, dx_token, dx_head,
    cos_batch, cos_row, sin_batch, sin_row, positions_batch, positions_token,
    seqlen, tokens, group, groups, heads, table_rows, eps, offset,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Of one group of heads, of q or of k, at every num_programs-th token.

    `partials` is (programs, groups, HEAD_DIM): the sums that make up the weight's gradient.
    """
    head = group * HEADS + tl.arange(0, HEADS)[:, None]
    inside = head < heads
    head = head.to(tl.int64)
    sum_first = tl.zeros((HEADS, PAIRS), tl.float32)
    sum_second = tl.zeros((HEADS, PAIRS), tl.float32)
    sum_rest = sum_first
    if REST > 0:
        sum_rest = tl.zeros((HEADS, REST), tl.float32)
    if weight_ptr is not None:
        w_first, w_second, w_rest = _load_weight(
            weight_ptr, offset, HEAD_DIM, HALF, INTERLEAVED, PAIRS, REST
        )
    for number in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        b, t, of_cos, of_sin = _of_token(
            tl.cast(number, tl.int64), cos_ptr, sin_ptr, positions_ptr, cos_batch, cos_row,
            sin_batch, sin_row, positions_batch, positions_token, seqlen, table_rows,
        )  # fmt: skip
        d_first, d_second, d_rest = _load_heads(
            dout_ptr + b * dout_batch + t * dout_token, head * dout_head, inside, HEAD_DIM, HALF,
            INTERLEAVED, PAIRS, REST,
        )  # fmt: skip
        cos_first, cos_second = _load_angles(of_cos, HALF, FULL, INTERLEAVED, PAIRS)
        sin_first, sin_second = _load_angles(of_sin, HALF, FULL, INTERLEAVED, PAIRS)
        turned = d_first * cos_first + d_second * sin_second
        d_second = d_second * cos_second - d_first * sin_first
        d_first = turned
        if weight_ptr is not None:
            first, second, rest = _load_heads(
                x_ptr + b * x_batch + t * x_token, head * x_head, inside, HEAD_DIM, HALF,
                INTERLEAVED, PAIRS, REST,
            )  # fmt: skip
            squares = _sum_of_products(first, first, second, second, rest, rest, REST)
            rstd = tl.rsqrt(squares / HEAD_DIM + eps)
            first *= rstd
            second *= rstd
            sum_first += d_first * first
            sum_second += d_second * second
            d_first *= w_first
            d_second *= w_second
            if REST > 0:
                rest *= rstd
                sum_rest += d_rest * rest
                d_rest *= w_rest
            mean = _sum_of_products(d_first, first, d_second, second, d_rest, rest, REST) / HEAD_DIM
            d_first = (d_first - first * mean) * rstd
            d_second = (d_second - second * mean) * rstd
            if REST > 0:
                d_rest = (d_rest - rest * mean) * rstd
        _store_heads(
            dx_ptr + b * dx_batch + t * dx_token, head * dx_head, inside, d_first, d_second, d_rest,
            HEAD_DIM, HALF, INTERLEAVED, PAIRS, REST,
        )  # fmt: skip
    if partials_ptr is not None:
        _store_heads(
            partials_ptr, ((tl.program_id(0) * groups + group) * HEAD_DIM).to(tl.int64)
            + tl.zeros((1, 1), tl.int64), tl.full((1, 1), True, tl.int1),
            tl.sum(sum_first, 0, keep_dims=True), tl.sum(sum_second, 0, keep_dims=True),
            tl.sum(sum_rest, 0, keep_dims=True), HEAD_DIM, HALF, INTERLEAVED, PAIRS, REST,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NEVER_SPECIALISED)
def _norm_backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr,
    dq_out_ptr, dk_out_ptr, q_partials_ptr, k_partials_ptr,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    dq_out_batch, dq_out_token, dq_out_head, dk_out_batch, dk_out_token, dk_out_head,
    cos_batch, cos_row, sin_batch, sin_row, positions_batch, positions_token,
    seqlen, heads, kv_heads, groups, table_rows, tokens, eps, offset,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of every num_programs(0)-th token a program: q's groups first, then k's."""
    group = tl.program_id(1)
    if group < groups:
        _head_gradients(
            dq_ptr, q_ptr, q_weight_ptr, dq_out_ptr, q_partials_ptr, cos_ptr, sin_ptr,
            positions_ptr, dq_batch, dq_token, dq_head, q_batch, q_token, q_head,
            dq_out_batch, dq_out_token, dq_out_head, cos_batch, cos_row, sin_batch, sin_row,
            positions_batch, positions_token, seqlen, tokens, group, groups, heads, table_rows,
            eps, offset, HEAD_DIM, HALF, FULL, INTERLEAVED, HEADS, PAIRS, REST,
        )  # fmt: skip
    else:
        _head_gradients(
            dk_ptr, k_ptr, k_weight_ptr, dk_out_ptr, k_partials_ptr, cos_ptr, sin_ptr,
            positions_ptr, dk_batch, dk_token, dk_head, k_batch, k_token, k_head,
            dk_out_batch, dk_out_token, dk_out_head, cos_batch, cos_row, sin_batch, sin_row,
            positions_batch, positions_token, seqlen, tokens, group - groups,
            tl.num_programs(1) - groups, kv_heads, table_rows, eps, offset, HEAD_DIM, HALF, FULL,
            INTERLEAVED, HEADS, PAIRS, REST,
        )  # fmt: skip


def backward(
    dq: torch.Tensor,  # (batch, seqlen, heads, head_dim)
    dk: torch.Tensor,  # (batch, seqlen, kv_heads, head_dim)
    q: torch.Tensor | None,  # as dq, where it has a norm
    k: torch.Tensor | None,  # as dk, where it has a norm
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    eps: float,
    weight_offset: float,
    q_weight_grad: bool,
    k_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q and k, and those of the weights that are asked for, else empty tensors."""
    if q_weight is None and k_weight is None:
        turned = forward(
            dq, dk, cos, sin, positions, None, None, rotary_dim, interleaved, eps, weight_offset,
            back=True,
        )  # fmt: skip
        return *turned, results.of_weight(dq, None, False), results.of_weight(dk, None, False)

    outs = results.like(dq), results.like(dk)
    (batch, seqlen, heads, head_dim), kv_heads = dq.shape, dk.shape[2]
    dq, dk = _by_heads(dq), _by_heads(dk)
    q, k = dq if q is None else _by_heads(q), dk if k is None else _by_heads(k)
    tile = tiles.backward(head_dim, rotary_dim, max(heads, kv_heads))
    angles, angle_strides, switches = _angles(cos, sin, positions, q, rotary_dim, interleaved, tile)
    groups, kv_groups = triton.cdiv(heads, tile.heads), triton.cdiv(kv_heads, tile.heads)
    tokens = batch * seqlen
    programs = min(tokens, tiles.PROGRAMS * launch.multiprocessors(q.device))

    def partials(wanted: bool, number: int) -> torch.Tensor | None:
        if not wanted:
            return None
        return q.new_empty(programs, number, head_dim, dtype=torch.float32)

    both = partials(q_weight_grad, groups), partials(k_weight_grad, kv_groups)
    launch.launch(
        _norm_backward_kernel, (programs, groups + kv_groups),
        dq, dk, q, k, dense(q_weight), dense(k_weight), *angles, *outs, *both,
        *dq.stride()[:3], *dk.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        *outs[0].stride()[:3], *outs[1].stride()[:3], *angle_strides,
        seqlen, heads, kv_heads, groups, cos.shape[-2], tokens, eps, weight_offset, **switches,
    )  # fmt: skip
    dweights = []
    for dx, weight, sums in zip(outs, (q_weight, k_weight), both, strict=True):
        dweight = results.of_weight(dx, weight, sums is not None)
        if sums is not None:
            dweight.copy_(sums.sum((0, 1)))
        dweights.append(dweight)
    return *outs, *dweights  # type: ignore[return-value]


# --- what both launchers need ---------------------------------------------------------------------


def _angles(
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    q: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    tile: tiles.Tile,
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """cos, sin and positions, their strides by batch and token, and the kernels' constants."""
    cos, sin = _by_heads(cos), _by_heads(sin)
    strides: list[int] = []
    for x in (cos, sin):
        own = x.dim() == 3 and x.shape[0] > 1
        strides += [x.stride(0) if own else 0, x.stride(-2)]
    if positions is None:
        strides += [0, 0]
    else:
        own = positions.dim() == 2 and positions.shape[0] > 1
        strides += [positions.stride(0) if own else 0, positions.stride(-1)]
    switches = {
        "HEAD_DIM": q.shape[3],
        "HALF": rotary_dim // 2,
        "FULL": cos.shape[-1] == rotary_dim,
        "INTERLEAVED": interleaved,
        "HEADS": tile.heads,
        "PAIRS": tile.pairs,
        "REST": tile.rest,
        "num_warps": tile.num_warps,
        "maxnreg": chips.all_registers(tile.num_warps),
    }
    return (cos, sin, positions), tuple(strides), switches


def _by_heads(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous: itself, where it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
