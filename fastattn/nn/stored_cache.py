"""The scales of a cache of 8-bit numbers, fixed by the first tokens that it gets.

    scale = margin absmax / largest

of each sequence and key head, where absmax is over its first tokens, a prompt, and largest is 127
for int8, 448 for float8_e4m3fn. Later tokens beyond margin absmax are cut to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # a scale of 1 lets these be

# float8 loses nothing by a wide one, for its step follows the number's size.
MARGIN = {torch.int8: 1.25, torch.float8_e4m3fn: 2.0}
LEAST = 1e-12  # of a head of zeros


def fix_scale(scale: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Fix the scales (batch, heads) that are 0 by x (batch, seqlen, heads, head_dim).

    Decided on the device, so that a CUDA graph can replay it.
    """
    absmax = x.float().abs().amax((1, 3))
    fixed = (absmax * (MARGIN[dtype] / LARGEST[dtype])).clamp(min=LEAST)
    scale.copy_(torch.where(scale > 0, scale, fixed))
