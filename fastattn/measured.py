"""Measurements by device: the calls for which a kernel is faster than its replacement.

One table. A row says that on this device the calls of `least` elements and more, up to `most`, are
faster on this backend than on the next one, forward and backward together where gradients are
wanted:

    ("attention", "cuda", "bfloat16", False, "NAME OF THE GPU"): Faster("triton", "DATE"),
    ("ffn", "triton", "float16", True, "NAME OF THE GPU"): Faster("torch", "DATE", least=SIZE),

`python benchmarks/never_slower.py --table FILE...` and `--faster FILE...` print the rows, from
results that it wrote on the device.

The user has a table too, of each GPU on which `fastattn tune` compared the backends: a file in the
cache folder, read when the first call on that GPU asks. Its rows come before those of this one. It
holds for the state of the kernels that was measured, and is ignored by any other.

The automatic choice asks `declined`. Without a row it takes the Triton kernels, and the others only
on the architecture that they are written for (`WRITTEN_FOR`). A row is of plain calls of an op, as
the benchmark makes them: other calls have no size (`elements` of the op's problem is None). Nobody
asks where the user names the backend, nor for a backward that follows a kernel's forward. While
torch.compile traces, a row counts for every size, but for one that has none: a choice by size would
tie the graph to a sequence length. Whether a kernel is right on a device is proving.py's question.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn import files, user_cache
from fastattn.extension import constant


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
    """It is faster than `than` from `least` elements to `most`, measured on `date`.

    With a `most` of 0 it is at no size.
    """

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

# The backends that are not chosen without a row, but on the architecture of their kernels.
WRITTEN_FOR = {"gluon": "sm_90", "cuda": "sm_80"}


def declined(backend: str, problem: Any) -> str | None:
    """The reason why the automatic choice passes `backend` over, or None if it may run."""
    if backend not in WRITTEN_FOR and not TABLE and not _tuned(problem.device):
        return None
    row, device, size = None, "this GPU", problem.elements
    if size is not None:
        row, device = find(
            problem.op, backend, problem.dtype, problem.needs_grad, problem.device
        ) or (None, device)
    if row is not None:
        traced = torch.compiler.is_compiling() or not isinstance(size, int)
        return None if traced and row.most != 0 else slower(row, device, size)
    if backend not in WRITTEN_FOR or WRITTEN_FOR[backend] in devices(problem.device):
        return None
    where = "with these features" if size is None else f"on {device}"
    return f"not measured {where}: name backend={backend!r} to use it"


def found(backend: str, problem: Any) -> bool:
    """Whether there is a row of the problem's kind."""
    kind = problem.op, backend, problem.dtype, problem.needs_grad, problem.device
    return problem.elements is not None and find(*kind) is not None


def find(
    op: str, backend: str, dtype: torch.dtype, needs_grad: bool | None, device: torch.device
) -> tuple[Faster, str] | None:
    """The row of a key and the name of the device that it has, None where nobody has measured."""
    named = str(dtype).removeprefix("torch.")
    if (mine := _mine(op, backend, named, needs_grad, device)) is not None:
        return Faster(*mine[1:]), mine[0]
    for name in devices(device) if TABLE else ():
        if (row := TABLE.get((op, backend, named, needs_grad, name))) is not None:
            return row, name
    return None


def slower(row: Faster, device: str, size: int) -> str | None:
    """The reason why a call of `size` elements goes elsewhere, None where the kernel is faster."""
    if row.most == 0:
        limit = "at any number of"
    elif size < row.least:
        limit = f"below {row.least}"
    elif row.most is not None and size > row.most:
        limit = f"above {row.most}"
    else:
        return None
    return f"not faster than {row.than} {limit} elements ({device}, {row.date})"


def limits(sizes: Mapping[int, bool]) -> tuple[int, int | None] | None:
    """(least, most) of the longest series of good sizes, the last one of equals; None without any.

    A side is open where nothing was measured beyond it. The sizes between two that were measured
    go where the worse one of them goes.
    """
    best: list[int] = []
    series: list[int] = []
    for size in sorted(sizes):
        series = [*series, size] if sizes[size] else []
        best = series if len(series) >= len(best) else best
    if not best:
        return None
    return best[0] if best[0] > min(sizes) else 0, best[-1] if best[-1] < max(sizes) else None


@constant
def devices(device: torch.device) -> tuple[str, ...]:
    """The names that a row may have for `device`, the most precise one first."""
    if device.type != "cuda":
        return (device.type,)
    if not torch.cuda.is_available():  # a fake tensor can name a device that is not there
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


# --- the user's measurements ----------------------------------------------------------------------

FOLDER = "measured"
LARGEST, MOST_ROWS, LONGEST = 2**20, 4096, 200  # bytes and rows of a file, characters of a name
BACKENDS = ("gluon", "cuda", "triton")
AGAIN = "`fastattn tune` measures again"


def path_of(name: str) -> Path | None:
    """The file of the GPU that torch names so, None where the user has no home."""
    return user_cache.file(FOLDER, name)


def write(name: str, rows: Mapping[Key, Faster]) -> Path:
    """Add rows to the user's of a GPU, whole or not at all; those of other kernels go.

    Raises:
        OSError: they cannot be written.
    """
    path = path_of(name)
    if path is None:
        raise OSError("there is no cache folder: set XDG_CACHE_HOME, or HOME")
    note = {
        "device": name,
        "kernels": state(),
        "rows": [key._asdict() | row._asdict() for key, row in {**of_user(name), **rows}.items()],
    }
    files.write_text(path, json.dumps(note, indent=1) + "\n")
    of_user.cache_clear()
    return path


@functools.cache
def of_user(name: str) -> dict[Key, Faster]:
    """The user's rows of the GPU that torch names so; none of other kernels."""
    path = path_of(name)
    if path is None:
        return {}
    try:
        note = files.read_json(path, most=LARGEST)
        if _text(note["device"]) != name:
            raise ValueError(f"it is of {note['device']!r}")
        if note["kernels"] != state():
            return {}
        if len(note["rows"]) > MOST_ROWS:
            raise ValueError(f"it has more than {MOST_ROWS} rows")
        return dict(_read(row, name) for row in note["rows"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"fastattn: {path} is ignored, {type(error).__name__}: {error}; {AGAIN}"
        warnings.warn(told, RuntimeWarning, stacklevel=2)
        return {}


def state() -> str:
    """The state of the kernels, of which measurements are."""
    return hashlib.sha256(f"{user_cache.sources()} {user_cache.library()}".encode()).hexdigest()


def _read(row: dict[str, Any], name: str) -> tuple[Key, Faster]:
    """A row of the file, checked."""
    if set(row) != {*Key._fields, *Faster._fields}:
        raise ValueError(f"a row has the fields {sorted(row)}")
    key = Key(*(row[field] for field in Key._fields))
    faster = Faster(*(row[field] for field in Faster._fields))
    for text in (key.op, key.backend, key.dtype, key.device, faster.than, faster.date):
        _text(text)
    datetime.date.fromisoformat(faster.date)
    if key.backend not in BACKENDS or key.device != name:
        raise ValueError(f"a row is of {key.backend!r} on {key.device!r}")
    if key.needs_grad is not None and type(key.needs_grad) is not bool:
        raise ValueError(f"needs_grad is {key.needs_grad!r}")
    for size in (faster.least, 0 if faster.most is None else faster.most):
        if type(size) is not int or size < 0:
            raise ValueError(f"a limit is {size!r}")
    return key, faster


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST or not value.isprintable():
        raise ValueError("a name is none")
    return value


def _name(device: torch.device) -> str | None:
    """The name of a GPU, None for a device that has no kernel to choose, and no file."""
    name = next(iter(devices(device)), device.type)
    return None if name == device.type else name


@constant
def _tuned(device: torch.device) -> bool:
    """Whether the user has rows of a device."""
    name = _name(device)
    return name is not None and bool(of_user(name))


@constant
def _mine(
    op: str, backend: str, dtype: str, needs_grad: bool | None, device: torch.device
) -> tuple[str, str, str, int, int | None] | None:
    """The device's name and the user's row of a key, as a plain tuple."""
    name = _name(device)
    row = name and of_user(name).get(Key(op, backend, dtype, needs_grad, name))
    return (name, row.than, row.date, row.least, row.most) if name and row else None
