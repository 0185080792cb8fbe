"""Measurements by device: the calls for which a kernel is faster than its replacement.

One table. A row says that on this device the calls of `least` elements and more, up to `most`, are
faster on this backend than on the next one, forward and backward together where gradients are
wanted:

    ("attention", "cuda", "bfloat16", False, "NAME OF THE GPU"): Faster("triton", "DATE"),
    ("ffn", "triton", "float16", True, "NAME OF THE GPU"): Faster("torch", "DATE", least=SIZE),

`python benchmarks/never_slower.py --table FILE...` and `--faster FILE...` print the rows, from
results that it wrote on the device.

The automatic choice asks `declined`. Without a row it takes the Triton kernels, and does not take
those in Gluon and CUDA C++: a kernel that nobody has measured on a GPU is not chosen for anybody. A
row is of plain calls of an op, as the benchmark makes them: other calls have no size (`elements` of
the op's problem is None). Nobody asks where the user names the backend, nor for a backward that
follows a kernel's forward. While torch.compile traces, a row counts for every size: a choice by
size would tie the graph to a sequence length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Key(NamedTuple):
    """The subject of a measurement.

    Attributes:
        op: the op's name; or a part of an op whose kernels have several ways (ops/ffn/cuda.py).
        backend: "gluon", "cuda" or "triton".
        dtype: of the problem, without "torch.".
        needs_grad: whether gradients are wanted; None for a norm, whose plans do not know.
        device: as torch names it, e.g. "NVIDIA H200", an architecture, e.g. "sm_90", or "cpu".
    """

    op: str
    backend: str
    dtype: str
    needs_grad: bool | None
    device: str


class Faster(NamedTuple):
    """It is faster than `than` from `least` elements to `most`, measured on `date`."""

    than: str
    date: str
    least: int = 0
    most: int | None = None


# Empty: no GPU has been measured yet, and on a CPU no kernel is chosen for anybody.
TABLE: dict[tuple[str, str, str, bool | None, str], Faster] = {}

# Where ATen's attention takes less time computed in float32 (ops/attention/sdpa.py), by the
# multiplications of one head's q k^T: dtype, whether gradients are wanted, the CPU's vector
# instructions (without AMX). AMD EPYC, 1 thread, torch 2.13; AVX2 on the same one, by
# ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA. Without gradients bfloat16 is as fast as float32.
IN_FLOAT32: dict[tuple[torch.dtype, bool, str], Faster] = {
    (torch.float16, False, "AVX512"): Faster("float16", "2026-11-29", 4096),
    (torch.float16, True, "AVX512"): Faster("float16", "2026-11-29", 32768),
    (torch.bfloat16, True, "AVX512"): Faster("bfloat16", "2026-11-29", 32768, 2_600_000),
    (torch.float16, False, "AVX2"): Faster("float16", "2026-11-29", 4096),
    (torch.float16, True, "AVX2"): Faster("float16", "2026-11-29", 32768),
    (torch.bfloat16, True, "AVX2"): Faster("bfloat16", "2026-11-29", 32768),
}

ONLY_MEASURED = ("gluon", "cuda")  # the backends that are not chosen without a row


def declined(backend: str, problem: Any) -> str | None:
    """The reason why the automatic choice passes `backend` over, or None if it may run."""
    if not TABLE and backend not in ONLY_MEASURED:
        return None
    row, device, size = None, "this GPU", problem.elements
    if size is not None:
        row, device = find(
            problem.op, backend, problem.dtype, problem.needs_grad, problem.device
        ) or (None, device)
    if row is not None:
        traced = torch.compiler.is_compiling() or not isinstance(size, int)
        return None if traced else slower(row, device, size)
    if backend not in ONLY_MEASURED:
        return None
    where = "with these features" if size is None else f"on {device}"
    return f"not measured {where}: name backend={backend!r} to use it"


def find(
    op: str, backend: str, dtype: torch.dtype, needs_grad: bool | None, device: torch.device
) -> tuple[Faster, str] | None:
    """The row of a key and the name of the device that it has, None where nobody has measured."""
    for name in devices(device) if TABLE else ():
        key = Key(op, backend, str(dtype).removeprefix("torch."), needs_grad, name)
        if (row := TABLE.get(key)) is not None:
            return row, name
    return None


def slower(row: Faster, device: str, size: int) -> str | None:
    """The reason why a call of `size` elements goes elsewhere, None where the kernel is faster."""
    if size < row.least:
        limit = f"below {row.least}"
    elif row.most is not None and size > row.most:
        limit = f"above {row.most}"
    else:
        return None
    return f"not faster than {row.than} {limit} elements ({device}, {row.date})"


def devices(device: torch.device) -> tuple[str, ...]:
    """The names that a row may have for `device`, the most precise one first."""
    if device.type != "cuda":
        return (device.type,)
    if not torch.cuda.is_available():  # a fake tensor can name a device that is not there
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"
