"""The norms' Triton kernels: `forward` and `backward`, one family for layer_norm and rms_norm.

With s = D x + residual (rounded to its dtype), D the dropout (0 or 1 / (1 - dropout_p), made again
in the backward), u = (s - mean) * rstd (mean = 0 for rms_norm) and
g = dout * weight:

    out = u * weight + bias
    ds  = (g - mean(g) - u * mean(g * u)) * rstd + dstream     (no mean(g) for rms_norm)
    dresidual = ds,  dx = D ds
    dweight = sum over rows of dout * u,  dbias = sum over rows of dout

Tensors are (rows, hidden), the last dimension contiguous, rows evenly spaced. A tile's first row is
found with 64-bit offsets, the rest of the tile from there with 32. All arithmetic is float32. Rows
up to 8192 (tiles.py) stay in registers between their reduction and their result; longer ones, up
to 65536, are read in chunks. Sums over rows go in a fixed order, for they have two stages: every
program adds up its own rows, then one kernel adds up the programs. Not supported: float64, and
gradients of gradients (registration.py takes those from the reference).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastattn import chips
from fastattn.ops.common import dropout, launch
from fastattn.ops.common.triton.dropout import Dropout, keep_tile
from fastattn.ops.layer_norm import results, tiles
from fastattn.ops.layer_norm.problem import NormProblem


def unsupported(problem: NormProblem) -> str | None:
    if problem.transformed:
        return "the kernels have no forward-mode or batching rule"
    if torch.float64 in problem.dtypes:
        return "the kernels compute in float32: float64 would lose precision"
    if problem.hidden > tiles.MAX_HIDDEN:
        return f"the kernels take hidden sizes up to {tiles.MAX_HIDDEN}; got {problem.hidden}"
    return None


# --- dropout ------------------------------------------------------------------------------------


@triton.jit
def _dropped(
    s,  # (height, BLOCK), float32
    row,  # (height, 1), of all the rows
    first_column,
    seed_ptr,
    threshold,
    inverse_keep,
    BLOCK: tl.constexpr,
):
    """D s of a tile."""
    dropout = Dropout(tl.load(seed_ptr), 0, threshold, inverse_keep)
    return tl.where(keep_tile(dropout, row, first_column, BLOCK, False), s * inverse_keep, 0.0)


@triton.jit
def _dropped_chunk(s, row, chunk, seed_ptr, threshold, inverse_keep, BLOCK: tl.constexpr):
    """D s of a chunk, (BLOCK,), of one row."""
    rows = tl.full((1, 1), 0, tl.int32) + row.to(tl.int32)
    tile = s.reshape(1, BLOCK)
    tile = _dropped(tile, rows, chunk * BLOCK, seed_ptr, threshold, inverse_keep, BLOCK)
    return tile.reshape(BLOCK)


# --- forward ------------------------------------------------------------------------------------


@triton.jit
def _add_residual(s, residual_ptr, stream_ptr, in_offset, out_offset, mask):
    """s + residual, rounded to the stream's dtype, which is stored."""
    residual = tl.load(residual_ptr + in_offset, mask=mask, other=0.0)
    stream = (s + residual.to(tl.float32)).to(stream_ptr.dtype.element_ty)
    tl.store(stream_ptr + out_offset, stream, mask=mask)
    return stream.to(tl.float32)


@triton.jit
def _scale_and_shift(
    u, weight_ptr, bias_ptr, column, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """u * weight + bias; both stay in the L1 cache for the next rows."""
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last")
        u *= weight.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last")
        u += bias.to(tl.float32)
    return u


@triton.jit(do_not_specialize=["rows", "threshold"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, stream_ptr, statistics_ptr, seed_ptr,
    threshold, inverse_keep, x_stride, residual_stride, rows, eps,
    HIDDEN: tl.constexpr, CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    if CONTIGUOUS:  # a constant, whose divisibility lets loads be 16 bytes wide
        x_stride = HIDDEN
        residual_stride = HIDDEN
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    present = row < tl.minimum(rows - first, ROWS).to(tl.int32)
    inside = column < HIDDEN
    mask = present & inside
    out_offset = row * HIDDEN + column

    s = tl.load(x_ptr + first * x_stride + row * x_stride + column, mask=mask, other=0.0)
    s = s.to(tl.float32)
    if seed_ptr is not None:
        s = _dropped(s, (first + row).to(tl.int32), 0, seed_ptr, threshold, inverse_keep, BLOCK)
    if HAS_RESIDUAL:
        residual_ptr += first * residual_stride
        in_offset = row * residual_stride + column
        s = _add_residual(s, residual_ptr, stream_ptr + first * HIDDEN, in_offset, out_offset, mask)
    statistics_ptr += first
    if CENTER:
        mean = tl.sum(s, 1, keep_dims=True) / HIDDEN
        tl.store(statistics_ptr + rows + row, mean, mask=present)
        s = tl.where(inside, s - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / HIDDEN + eps)
    tl.store(statistics_ptr + row, rstd, mask=present)
    out = _scale_and_shift(s * rstd, weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
    tl.store(out_ptr + first * HIDDEN + out_offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunks", "threshold"])
def _forward_chunked_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, stream_ptr, statistics_ptr, seed_ptr,
    threshold, inverse_keep, x_stride, residual_stride, chunks, eps,
    HIDDEN: tl.constexpr, CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, in chunks of BLOCK.

    Each lane keeps mean and sum of squared deviations of the elements that it has seen (Welford);
    the lanes are merged once at the end (Chan).
    """
    if CONTIGUOUS:
        x_stride = HIDDEN
        residual_stride = HIDDEN
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    out_ptr += row * HIDDEN
    stream_ptr += row * HIDDEN
    lane = tl.arange(0, BLOCK)

    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for chunk in tl.range(0, chunks):
        column = chunk * BLOCK + lane
        mask = column < HIDDEN
        s = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            s = _dropped_chunk(s, row, chunk, seed_ptr, threshold, inverse_keep, BLOCK)
        if HAS_RESIDUAL:
            s = _add_residual(s, residual_ptr, stream_ptr, column, column, mask)
        if CENTER:
            delta = tl.where(mask, s - mean, 0.0)
            mean += delta * (1.0 / (chunk + 1))
            squares += delta * (s - mean)
        else:
            squares += s * s
    if CENTER:
        seen = ((HIDDEN - lane + (BLOCK - 1)) // BLOCK).to(tl.float32)
        lane_mean = mean
        mean = tl.sum(seen * lane_mean, 0) / HIDDEN
        squares += seen * (lane_mean - mean) * (lane_mean - mean)
        tl.store(statistics_ptr + tl.num_programs(0) + row, mean)
    rstd = tl.rsqrt(tl.sum(squares, 0) / HIDDEN + eps)
    tl.store(statistics_ptr + row, rstd)

    if HAS_RESIDUAL:
        tl.debug_barrier()  # a chunk may be read back by other threads than wrote it
        x_ptr = stream_ptr
    for chunk in tl.range(0, chunks):
        column = chunk * BLOCK + lane
        mask = column < HIDDEN
        s = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            s -= mean
        out = _scale_and_shift(s * rstd, weight_ptr, bias_ptr, column, mask, HAS_WEIGHT, HAS_BIAS)
        tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def forward(
    x: torch.Tensor,  # (..., hidden)
    residual: torch.Tensor | None,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    bias: torch.Tensor | None,  # (hidden,)
    eps: float,
    center: bool,
    out_dtype: torch.dtype,
    dropout_seed: torch.Tensor | None = None,  # (1,) int64; with a residual
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, stream, statistics), as results.py has them."""
    out, stream, statistics = results.of_forward(x, residual, center, out_dtype)
    if out.numel() == 0:
        return out, stream, statistics

    hidden = x.shape[-1]
    tile = tiles.forward(hidden)
    x, x_stride = _as_rows(x, tile.rows)
    residual_stride = x_stride
    if residual is not None:
        residual, residual_stride = _as_rows(residual, tile.rows)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = (
        x, _or(residual, x), _or(weight, x), _or(bias, x), out, stream, statistics,
        *_dropout(dropout_seed, dropout_p),
    )  # fmt: skip
    wide = _wide(hidden, x_stride, residual_stride)
    switches = {
        "HIDDEN": hidden,
        "CENTER": center,
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "CONTIGUOUS": x_stride == residual_stride == hidden,
        "BLOCK": tile.block,
        "num_warps": tile.num_warps,
        **_registers(not wide or dropout_seed is not None, tile.num_warps),
    }
    rows = x.shape[0]
    if tile.block < hidden:
        chunks = triton.cdiv(hidden, tile.block)
        launch.launch(
            _forward_chunked_kernel, (rows,), *tensors, x_stride, residual_stride, chunks, eps,
            **switches,
        )  # fmt: skip
    else:
        launch.launch(
            _forward_kernel, (triton.cdiv(rows, tile.rows),), *tensors, x_stride, residual_stride,
            rows, eps, ROWS=tile.rows, **switches,
        )  # fmt: skip
    return out, stream, statistics


# --- backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "threshold"])
def _backward_kernel(
    dout_ptr, dstream_ptr, stream_ptr, weight_ptr, statistics_ptr,
    dx_ptr, dresidual_ptr, seed_ptr, threshold, inverse_keep, partials_ptr,
    dout_stride, dstream_stride, stream_stride, rows,
    HIDDEN: tl.constexpr, CENTER: tl.constexpr, HAS_DSTREAM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr, CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Whole rows, ROWS at a time, every program every num_programs-th of them.

    `partials` is (1 or 2, programs, HIDDEN): the sums over each program's rows that make up the
    gradients of weight and bias, in this order.
    """
    if CONTIGUOUS:
        dout_stride = HIDDEN
        dstream_stride = HIDDEN
        stream_stride = HIDDEN
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < HIDDEN
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * ROWS
        present = row < tl.minimum(rows - first, ROWS).to(tl.int32)
        mask = present & inside
        g = tl.load(
            dout_ptr + first * dout_stride + row * dout_stride + column, mask=mask, other=0.0
        )
        u = tl.load(
            stream_ptr + first * stream_stride + row * stream_stride + column, mask=mask, other=0.0
        )
        g, u = g.to(tl.float32), u.to(tl.float32)
        rstd = tl.load(statistics_ptr + first + row, mask=present, other=0.0)
        if CENTER:
            u -= tl.load(statistics_ptr + rows + first + row, mask=present, other=0.0)
        u *= rstd
        # Columns outside have g = 0: they add nothing to any sum.
        if WEIGHT_GRAD:
            dweight += g * u
        if BIAS_GRAD:
            dbias += g
        if HAS_WEIGHT:
            g *= weight
        ds = g - u * (tl.sum(g * u, 1, keep_dims=True) / HIDDEN)
        if CENTER:
            ds -= tl.sum(g, 1, keep_dims=True) / HIDDEN
        ds *= rstd
        if HAS_DSTREAM:
            dstream = tl.load(
                dstream_ptr + first * dstream_stride + row * dstream_stride + column,
                mask=mask,
                other=0.0,
            )
            ds += dstream.to(tl.float32)
        out_offset = row * HIDDEN + column
        if HAS_DRESIDUAL:
            dresidual = ds.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + first * HIDDEN + out_offset, dresidual, mask=mask)
        if seed_ptr is not None:
            places = (first + row).to(tl.int32)
            ds = _dropped(ds, places, 0, seed_ptr, threshold, inverse_keep, BLOCK)
        tl.store(dx_ptr + first * HIDDEN + out_offset, ds.to(dx_ptr.dtype.element_ty), mask=mask)
    partials_ptr += program * HIDDEN
    if WEIGHT_GRAD:
        tl.store(partials_ptr + column, tl.sum(dweight, 0, keep_dims=True), mask=inside)
        partials_ptr += tl.num_programs(0) * HIDDEN
    if BIAS_GRAD:
        tl.store(partials_ptr + column, tl.sum(dbias, 0, keep_dims=True), mask=inside)


@triton.jit(do_not_specialize=["chunks", "threshold"])
def _backward_chunked_kernel(
    dout_ptr, dstream_ptr, stream_ptr, weight_ptr, statistics_ptr, dx_ptr, dresidual_ptr,
    seed_ptr, threshold, inverse_keep, dout_stride, dstream_stride, stream_stride, chunks,
    HIDDEN: tl.constexpr, CENTER: tl.constexpr, HAS_DSTREAM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, in chunks of BLOCK; only the input's gradient."""
    if CONTIGUOUS:
        dout_stride = HIDDEN
        dstream_stride = HIDDEN
        stream_stride = HIDDEN
    row = tl.program_id(0).to(tl.int64)
    dout_ptr += row * dout_stride
    dstream_ptr += row * dstream_stride
    stream_ptr += row * stream_stride
    dx_ptr += row * HIDDEN
    dresidual_ptr += row * HIDDEN
    lane = tl.arange(0, BLOCK)
    rstd = tl.load(statistics_ptr + row)
    mean = 0.0
    if CENTER:
        mean = tl.load(statistics_ptr + tl.num_programs(0) + row)

    g_sum = tl.zeros((BLOCK,), tl.float32)
    gu_sum = tl.zeros((BLOCK,), tl.float32)
    for chunk in tl.range(0, chunks):
        column = chunk * BLOCK + lane
        mask = column < HIDDEN
        g = tl.load(dout_ptr + column, mask=mask, other=0.0).to(tl.float32)
        u = (tl.load(stream_ptr + column, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        g = _scale_and_shift(g, weight_ptr, weight_ptr, column, mask, HAS_WEIGHT, False)
        g_sum += g
        gu_sum += g * u
    gu_mean = tl.sum(gu_sum, 0) / HIDDEN
    g_mean = 0.0
    if CENTER:
        g_mean = tl.sum(g_sum, 0) / HIDDEN

    for chunk in tl.range(0, chunks):
        column = chunk * BLOCK + lane
        mask = column < HIDDEN
        g = tl.load(dout_ptr + column, mask=mask, other=0.0).to(tl.float32)
        u = (tl.load(stream_ptr + column, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        g = _scale_and_shift(g, weight_ptr, weight_ptr, column, mask, HAS_WEIGHT, False)
        ds = (g - u * gu_mean - g_mean) * rstd
        if HAS_DSTREAM:
            ds += tl.load(dstream_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_DRESIDUAL:
            tl.store(dresidual_ptr + column, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if seed_ptr is not None:
            ds = _dropped_chunk(ds, row, chunk, seed_ptr, threshold, inverse_keep, BLOCK)
        tl.store(dx_ptr + column, ds.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _columns_kernel(
    dout_ptr, stream_ptr, statistics_ptr, partials_ptr, dout_stride, stream_stride, rows,
    HIDDEN: tl.constexpr, CENTER: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr, CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The weights' gradients of BLOCK columns, of every num_programs(1)-th tile of ROWS rows."""
    if CONTIGUOUS:
        dout_stride = HIDDEN
        stream_stride = HIDDEN
    program = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < HIDDEN
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * ROWS
        present = row < tl.minimum(rows - first, ROWS).to(tl.int32)
        mask = present & inside
        g = tl.load(
            dout_ptr + first * dout_stride + row * dout_stride + column, mask=mask, other=0.0
        )
        g = g.to(tl.float32)
        if WEIGHT_GRAD:
            u = tl.load(
                stream_ptr + first * stream_stride + row * stream_stride + column,
                mask=mask,
                other=0.0,
            ).to(tl.float32)
            if CENTER:
                u -= tl.load(statistics_ptr + rows + first + row, mask=present, other=0.0)
            dweight += g * u * tl.load(statistics_ptr + first + row, mask=present, other=0.0)
        if BIAS_GRAD:
            dbias += g
    partials_ptr += program * HIDDEN
    if WEIGHT_GRAD:
        tl.store(partials_ptr + column, tl.sum(dweight, 0, keep_dims=True), mask=inside)
        partials_ptr += tl.num_programs(1) * HIDDEN
    if BIAS_GRAD:
        tl.store(partials_ptr + column, tl.sum(dbias, 0, keep_dims=True), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _partials_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, programs,
    HIDDEN: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum over programs of (programs, HIDDEN)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < HIDDEN
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)[:, None]
        mask = (program < programs) & inside
        partials = partials_ptr + program * HIDDEN + column
        if WEIGHT_GRAD:
            dweight += tl.load(partials, mask=mask, other=0.0)
            partials += programs * HIDDEN
        if BIAS_GRAD:
            dbias += tl.load(partials, mask=mask, other=0.0)
    if WEIGHT_GRAD:
        total = tl.sum(dweight, 0, keep_dims=True)
        tl.store(dweight_ptr + column, total.to(dweight_ptr.dtype.element_ty), mask=inside)
    if BIAS_GRAD:
        total = tl.sum(dbias, 0, keep_dims=True)
        tl.store(dbias_ptr + column, total.to(dbias_ptr.dtype.element_ty), mask=inside)


def backward(
    dout: torch.Tensor,  # (..., hidden)
    dstream: torch.Tensor | None,  # (..., hidden)
    stream: torch.Tensor,  # (..., hidden)
    weight: torch.Tensor | None,  # (hidden,)
    statistics: torch.Tensor,  # (2 or 1, ...), of forward
    center: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    weight_grad: bool,
    dropout_seed: torch.Tensor | None = None,  # of forward
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dresidual, dweight, dbias), as results.py has them."""
    dx, dresidual, dweight, dbias = results.of_backward(
        stream, weight, x_dtype, residual_dtype, bias_dtype, weight_grad, dropout_p
    )
    hidden, device = stream.shape[-1], stream.device
    bias_grad, has_dresidual = bias_dtype is not None, dresidual.numel() > 0
    if stream.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()

    tile, columns = tiles.backward(hidden), tiles.COLUMNS
    whole = tile.block >= hidden
    together = tile.rows if whole else columns.rows
    dout, dout_stride = _as_rows(dout, together)
    stream, stream_stride = _as_rows(stream, together)
    dstream_stride = stream_stride
    if dstream is not None:
        dstream, dstream_stride = _as_rows(dstream, together)
    weight = None if weight is None else weight.contiguous()
    rows = stream.shape[0]
    processors = launch.multiprocessors(device)
    if whole:
        programs = min(tile.programs * processors, triton.cdiv(rows, tile.rows))
    else:
        blocks = triton.cdiv(hidden, columns.block)
        programs = min(
            triton.cdiv(columns.programs * processors, blocks), triton.cdiv(rows, columns.rows)
        )
    shape = (weight_grad + bias_grad, programs, hidden)
    partials = torch.empty(shape, dtype=torch.float32, device=device)

    tensors = (
        dout, _or(dstream, dout), stream, _or(weight, stream), statistics, dx, dresidual,
        *_dropout(dropout_seed, dropout_p),
    )  # fmt: skip
    strides = (dout_stride, dstream_stride, stream_stride)
    wide = _wide(hidden, *strides)
    switches = {
        "HIDDEN": hidden,
        "CENTER": center,
        "HAS_DSTREAM": dstream is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_DRESIDUAL": has_dresidual,
        "CONTIGUOUS": strides == (hidden,) * 3,
        "BLOCK": tile.block,
        "num_warps": tile.num_warps,
        **_registers(not wide or dropout_seed is not None, tile.num_warps),
    }
    gradients = {"WEIGHT_GRAD": weight_grad, "BIAS_GRAD": bias_grad}
    stages = 1
    if wide:
        inputs = [dout, stream] if dstream is None else [dout, stream, dstream]
        element_bytes = sum(tensor.element_size() for tensor in inputs)
        looping = tile if whole else columns
        stages = tiles.stages(launch.architecture(device), looping, element_bytes)
    if whole:
        launch.launch(
            _backward_kernel, (programs,), *tensors, partials, *strides, rows,
            ROWS=tile.rows, STAGES=stages, **gradients, **switches,
        )  # fmt: skip
    else:
        chunks = triton.cdiv(hidden, tile.block)
        launch.launch(_backward_chunked_kernel, (rows,), *tensors, *strides, chunks, **switches)
    if not (weight_grad or bias_grad):
        return dx, dresidual, dweight, dbias
    if not whole:
        launch.launch(
            _columns_kernel, (blocks, programs), dout, stream, statistics, partials, dout_stride,
            stream_stride, rows, HIDDEN=hidden, CENTER=center, CONTIGUOUS=switches["CONTIGUOUS"],
            ROWS=columns.rows, BLOCK=columns.block, num_warps=columns.num_warps, **gradients,
            STAGES=stages, **_registers(not wide, columns.num_warps),
        )  # fmt: skip
    last = tiles.PARTIALS
    launch.launch(
        _partials_kernel, (triton.cdiv(hidden, last.block),), partials, dweight, dbias, programs,
        HIDDEN=hidden, ROWS=last.rows, BLOCK=last.block, num_warps=last.num_warps, **gradients,
    )  # fmt: skip
    return dx, dresidual, dweight, dbias


def _dropout(seed: torch.Tensor | None, dropout_p: float) -> tuple[torch.Tensor | None, Any, Any]:
    """seed_ptr, threshold and inverse_keep of a kernel: None, and no code, without dropout."""
    if seed is None:
        return None, None, None
    return seed, dropout.threshold(dropout_p), 1.0 / (1.0 - dropout_p)


def _as_rows(tensor: torch.Tensor, together: int) -> tuple[torch.Tensor, int]:
    """`tensor` as (rows, hidden) and its row stride; a copy only if no view has that form.

    Or if `together` rows, a tile's, are so far apart that their offsets would not fit 32 bits.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) * together >= 2**31:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _wide(hidden: int, *strides: int) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    return hidden % 8 == 0 and all(stride == hidden for stride in strides)


def _registers(many: bool, num_warps: int) -> dict[str, int]:
    """All the registers there are, for what takes `many`: narrow loads' addresses, random words."""
    return {"maxnreg": chips.all_registers(num_warps)} if many else {}


def _or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A pointer for an argument that the kernel's switches leave alone."""
    return unused if tensor is None else tensor
