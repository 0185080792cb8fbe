"""How a cache of 8-bit numbers holds keys and values, with one scale for each key head.

    value = stored scale,  stored = x / scale in float32, cut to the dtype's range, rounded to even

NaN becomes 0 in int8, which has none, and stays NaN in float8_e4m3fn (Micikevicius et al. 2022,
arXiv:2209.05433). A scale of absmax / 127, or absmax / 448, lets no value be cut.
"""

from __future__ import annotations

import torch

DTYPES = (torch.int8, torch.float8_e4m3fn)


def quantised(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (batch, seqlen, heads, width) as `dtype`, by scale (heads,) or (batch, heads)."""
    scaled = x.float() / scale[..., None, :, None]
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max  # torch's cast makes NaN of what is beyond
        return scaled.clamp(-largest, largest).to(dtype)
    return scaled.nan_to_num(nan=0.0).round().clamp(-128, 127).to(dtype)


def dequantised(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of stored (batch, seqlen, heads, width) in `dtype`, float32 or wider."""
    return stored.to(dtype) * scale[..., None, :, None].to(dtype)


def bits(cache: torch.Tensor) -> torch.Tensor:
    """The same memory, of float8_e4m3fn as uint8: for what does not take that dtype."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
