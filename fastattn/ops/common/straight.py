"""Whether a call on a CPU may go straight to ATen, without being described.

To look up a plan (plans.py) takes 3 to 7 us, as long as ATen takes for a few rows. But most calls
on a CPU are plain: of them it is known beforehand that the backend is `torch`, and what it does. So
the interface of an op first asks the `straight` of its `aten.py`, which asks `plain` about the
tensors, and itself about the other arguments, and then calls ATen as the described call would.

The answer None means nothing but "describe it": for whatever is out of the ordinary, and where ATen
raises one of `ERRORS`, so that the errors of a caller are those of the op's `problem.py`. What ATen
would take and the op refuses, `straight` has to see itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.common import modes, slower

TYPES = frozenset((Tensor, torch.nn.Parameter))
# Not float64, where attention prefers the reference.
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_NOBODY = None, None


def plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these are tensors of one dtype on the CPU, for which nobody chooses a backend.

    Who might: `use_backend`, the environment, and the table of what is slower. A recording has no
    use for the short way. Transforms and autocast (`modes.plain`) are for an op to ask about, if
    they change what it does.
    """
    if modes.recorded() or type(x) not in TYPES or x.is_nested:
        return False
    dtype = x.dtype
    if dtype not in DTYPES or not x.is_cpu or slower.TABLE or backends.state() != _NOBODY:
        return False
    for other in others:
        if other is not None and (other.dtype is not dtype or not other.is_cpu):
            return False
    return True
