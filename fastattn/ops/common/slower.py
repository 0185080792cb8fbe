"""Where a backend was measured to be slower than the next one: there the automatic choice skips it.

`python benchmarks/never_slower.py --table FILE...` prints the rows, from results that it wrote on
the device with `--backend triton`:

    ("ffn", "triton", "bfloat16", False, "NAME OF THE GPU"): Slower("torch", "DATE", below=SIZE),

A row is of plain calls of an op, as the benchmark makes them: other calls have no size (`elements`
of the op's problem is None) and no row. It is not asked where the user names the backend, nor by a
backward that follows a kernel's forward. Nor while torch.compile traces: a choice by size would tie
the graph to a sequence length, and there the cost of a call on the host, which is what makes small
problems slow, is small anyway.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from fastattn.backends import Backend


class Key(NamedTuple):
    """What a measurement is of.

    Attributes:
        op: the op's name.
        backend: the one that is slower.
        dtype: of the problem, without "torch.".
        needs_grad: whether gradients are wanted; None for a norm, whose plans do not know.
        device: as torch names it, e.g. "NVIDIA H200", an architecture, e.g. "sm_90", or "cpu".
    """

    op: str
    backend: str
    dtype: str
    needs_grad: bool | None
    device: str


class Slower(NamedTuple):
    """It is slower than the backend `than` below and above these sizes, measured on `date`."""

    than: str
    date: str
    below: int = 0
    above: int | None = None


# Empty: no GPU has been measured yet, and on a CPU no kernel is chosen for anybody.
TABLE: dict[tuple[str, str, str, bool | None, str], Slower] = {}


def consulted(backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
    """The same, declining what they were measured to be slower at; `cuda` has a rule of its own."""
    return tuple(
        dataclasses.replace(backend, slower=backend.slower or declined) for backend in backends
    )


def declined(backend: str, problem: Any) -> str | None:
    """The reason why the next backend is faster, or None where nothing says so."""
    if torch.compiler.is_compiling() or not TABLE:
        return None
    elements = problem.elements
    if not isinstance(elements, int):  # None, or symbolic
        return None
    for device in devices(problem.device):
        dtype = str(problem.dtype).removeprefix("torch.")
        row = TABLE.get(Key(problem.op, backend, dtype, problem.needs_grad, device))
        if row is None:
            continue
        if elements < row.below:
            return f"slower than {row.than} below {row.below} elements ({device}, {row.date})"
        if row.above is not None and elements > row.above:
            return f"slower than {row.than} above {row.above} elements ({device}, {row.date})"
        return None
    return None


def devices(device: torch.device) -> tuple[str, ...]:
    """What a row may call `device`, the most precise name first."""
    if device.type != "cuda":
        return (device.type,)
    if not torch.cuda.is_available():  # a fake tensor can name a device that is not there
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"
