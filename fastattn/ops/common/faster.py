"""Where a CUDA C++ kernel was measured to be faster: there alone the automatic choice takes it.

A kernel that nobody has measured on a GPU is not chosen for anybody; `backend="cuda"` names it.
A row says that on this device the calls of `above` elements and more, up to `below`, are faster on
the `cuda` backend than on the next one, forward and backward together where gradients are wanted:

    ("attention", "cuda", "bfloat16", False, "NAME OF THE GPU"): Faster("triton", "DATE"),

`python benchmarks/never_slower.py --faster FILE...` prints the rows, from results that it wrote on
the device with `--backend cuda`, where Triton takes part in the same run. As in slower.py a row is
of plain calls, and is not asked where the user names the backend, nor by a backward that follows a
kernel's forward. While torch.compile traces, where no choice may depend on a size, a row counts for
every size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastattn.ops.common.slower import Key, devices


class Faster(NamedTuple):
    """It is faster than the backend `than` between these sizes, measured on `date`."""

    than: str
    date: str
    above: int = 0
    below: int | None = None


# Empty: no GPU has been measured yet.
TABLE: dict[tuple[str, str, str, bool | None, str], Faster] = {}


def declined(backend: str, problem: Any) -> str | None:
    """The reason why the next backend is taken, or None where this one was measured as faster."""
    elements = problem.elements
    name = f"name backend={backend!r} to use it"
    if elements is None:
        return f"not measured with these features: {name}"
    dtype = str(problem.dtype).removeprefix("torch.")
    for device in devices(problem.device):
        row = TABLE.get(Key(problem.op, backend, dtype, problem.needs_grad, device))
        if row is None:
            continue
        if torch.compiler.is_compiling() or not isinstance(elements, int):
            return None
        if elements < row.above:
            return f"not faster than {row.than} below {row.above} elements ({device}, {row.date})"
        if row.below is not None and elements > row.below:
            return f"not faster than {row.than} above {row.below} elements ({device}, {row.date})"
        return None
    return f"not measured on this GPU: {name}"
