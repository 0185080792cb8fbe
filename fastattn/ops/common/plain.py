"""Calls of which it is known beforehand that the `torch` backend runs them: plain ones on a CPU.

To look up a plan takes 3 to 4 us, more where the caches are cold, as long as ATen takes for a few
rows. So an op's `straight.py` hands such calls to ATen without describing them. Its answer None
means "describe it": for all calls that are out of the ordinary, and where ATen raises one of
`ERRORS`, so that the errors of a caller are those of problem.py. What ATen would take and the op
refuses, it has to see itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import backends

TYPES = frozenset((Tensor, torch.nn.Parameter))
# Not float64, where attention prefers the reference.
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_NOBODY = None, None


def plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these are tensors of one dtype on the CPU, for which nobody chooses a backend.

    Who might: `use_backend` and the environment. torch.compile has no use for the short way.
    """
    if torch.compiler.is_compiling() or type(x) not in TYPES:
        return False
    dtype = x.dtype
    if dtype not in DTYPES or not x.is_cpu or backends.state() != _NOBODY:
        return False
    for other in others:
        if other is not None and (other.dtype is not dtype or not other.is_cpu):
            return False
    return True
