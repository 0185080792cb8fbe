"""The scales of a cache of 8-bit numbers, fixed by the first tokens that it gets.

    scale = margin absmax / largest

of each sequence and key head, where absmax is over the first tokens of its first call, at most
FIRST, and largest is 127 for int8, 448 for float8_e4m3fn. Later tokens beyond margin absmax are cut
to it. So sequences that begin with the same FIRST tokens have the same scales, however they are
read, and can share pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # a scale of 1 lets these be

# float8 loses nothing by a wide one, for its step follows the number's size.
MARGIN = {torch.int8: 1.25, torch.float8_e4m3fn: 2.0}
LEAST = 1e-12  # of a head of zeros
FIRST = 16  # tokens that decide
NAMES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}  # the values of ``cache_dtype``


def fix_scale(scale: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Fix the scales (batch, heads) that are 0 by x (batch, seqlen, heads, head_dim).

    Decided on the device, so that a CUDA graph can replay it.
    """
    absmax = x[:, :FIRST].float().abs().amax((1, 3))
    fixed = (absmax * (MARGIN[dtype] / LARGEST[dtype])).clamp(min=LEAST)
    scale.copy_(torch.where(scale > 0, scale, fixed))


def cache_options(cache_dtype: str | None) -> dict[str, Any]:
    """What a ``cache_dtype`` adds to the arguments of a model's `new_cache`.

    Raises ValueError unless it is None, for the model's own dtype, or one of NAMES.
    """
    if cache_dtype is None:
        return {}
    if cache_dtype not in NAMES:
        names = " or ".join(map(repr, NAMES))
        raise ValueError(
            f"cache_dtype must be {names}, or None for the model's; got {cache_dtype!r}"
        )
    return {"dtype": NAMES[cache_dtype]}
