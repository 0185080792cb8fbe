"""Numbers of 8 bits in a cache: tiles of them to 16 or 32 bits, and new ones back to 8.

Every stored number is one of float16 and of bfloat16 too, so that products take them without an
error; the scales act on the scores and on the output, in float32. int8 comes as it is, and
float8_e4m3fn from sm_89 on. Before, Triton has no such type, and its interpreter reads NaN as 480:
there it comes as uint8, whose bits are turned into a float16's by hand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(x, dtype: tl.constexpr):
    """Stored numbers in `dtype`, each exactly."""
    if x.dtype == tl.uint8:
        b = x.to(tl.uint16)
        magnitude = b & 0x7F
        nan = (magnitude + 1) & 0x80  # with which 0x7f gets the exponent of float16's NaN
        # The bias of the exponent is 7, that of float16 15. Subnormal numbers fit as well.
        x = ((magnitude | nan) << 7 | (b & 0x80) << 8).to(tl.float16, bitcast=True) * 256.0
    return x.to(dtype)


@triton.jit
def narrowed(
    x,  # (ROWS, BLOCK)
    scales,  # (ROWS,) pointers to the scales of the rows
    inside,  # (ROWS,) rows that exist
    dtype: tl.constexpr,  # tl.int8 or, for float8_e4m3fn, tl.uint8
):
    """x / scale as it is stored."""
    scale = tl.load(scales, mask=inside, other=1.0)[:, None]
    scaled = tl.div_rn(x.to(tl.float32), scale + tl.zeros(x.shape, tl.float32))
    is_nan = scaled != scaled
    if dtype == tl.int8:
        whole = tl.where(is_nan, 0.0, tl.minimum(tl.maximum(scaled, -128.0), 127.0))
        stored = ((whole + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 2^23: no room for fractions
    else:
        magnitude = tl.minimum(tl.abs(scaled), 448.0)
        b = magnitude.to(tl.uint32, bitcast=True)
        normal = ((b + 0x7FFFF + (b >> 20 & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the last place is 2^-9, as it is of float32 from 2^14 on.
        small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0x7F
        code = tl.where(is_nan, 0x7F, tl.where(magnitude < 0.015625, small, normal))
        sign = scaled.to(tl.uint32, bitcast=True) >> 24 & 0x80
        stored = (code | sign).to(tl.uint8)
    return stored
