"""The content of a results file: the types are the documentation, and every file is checked.

One file is one run of one subject on one device. `write` refuses data that does not fit, `read`
files that do not; both name the place. Times are in microseconds unless the name says otherwise,
sizes in bytes; a number that is not finite stands as a string ("nan", "inf").
"""

from __future__ import annotations

import json
import math
import os
import types
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

SCHEMA = "fastattn benchmark 3"
WIDTH = 500  # of a line of a file: that of a peer

Number = float | str  # a string where it is not finite


class Spread(TypedDict):
    """Of values that were taken once a round."""

    median: float
    p20: float
    p80: float


class Error(TypedDict):
    """Of one output or gradient, against the reference; `eager_*`: the errors of plain PyTorch.

    `within`: the largest error is at most twice, the rms error at most 1.5 times eager's, but for a
    few units in the last place.
    """

    max: Number
    rms: Number
    eager_max: Number
    eager_rms: Number
    within: bool


class Entry(TypedDict, total=False):
    """A peer in a row: its times, or why there are none.

    Attributes:
        refused: why the peer is absent, or cannot do this row.
        error: the failure of a peer that should not fail (ours, or a ceiling).
        ceiling: it does not do the row's work, only what bounds it: a copy, matrix products.
        median_us, p20_us, p80_us: of the times of a call, one value a round; each value is the
            mean of `calls` calls.
        first_call_seconds: compilation and captures included; in no other number.
        right: whether all `errors` are within.
        times_ours: this peer's time over ours inside a round; above 1 we are faster.
        tflops, gbps, tokens_per_second: the row's work over the median.
        share: of the rate that the row's ceiling (`bound`) reached in the same rounds.
        mfu: model FLOPs utilisation, see the file's `peak`.
        above_us: our time less this peer's inside a round.
        peak_bytes: the most memory above the inputs at any time of the call.
        saved_bytes: kept by the forward for the backward, beyond the inputs.
        note: anything else that a reader must know, e.g. the kernel that a dispatcher took.
    """

    refused: str
    error: str
    ceiling: bool
    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    calls: int
    first_call_seconds: float
    errors: list[Error]
    right: bool
    times_ours: Spread
    tflops: float
    gbps: float
    tokens_per_second: float
    decode_step_us: Spread
    share: float
    mfu: float
    above_us: Spread
    peak_bytes: int
    saved_bytes: int
    note: str


class _Row(TypedDict):
    title: str
    op: str
    direction: str
    dtype: str
    axes: dict[str, Any]
    right: bool


class Row(_Row, total=False):
    """One cell of the grid.

    Attributes:
        title: the cell in one line, unique in the file.
        op: "attention", "layer_norm", ...
        direction: "forward", "backward", "training step", ...
        axes: sizes and options by name.
        reference: the dtype of the definition that results were compared with.
        bound: the peer that is the ceiling of this row; `share` is of it.
        peers: by name, ours is "ours".
        right: ours is right, and nothing that should not break broke.
        target: the promise of this row, in words; `holds`: whether it was kept.
        error: the row could not be measured.
        gpu: clock, power, temperature and reasons for a lower clock, right after the timing.
    """

    reference: str
    bound: str
    peers: dict[str, Entry]
    target: str
    holds: bool
    error: str
    seconds: float
    gpu: dict[str, str]


class Skipped(TypedDict):
    title: str
    why: str


class Cuda(TypedDict):
    toolkit: str
    cudnn: int | None
    capability: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    sdpa_order: list[str]  # F.scaled_dot_product_attention's backends as this torch prefers them
    busy: list[str]  # other processes on the GPU when the run began, and its use of the chip
    nvidia_smi: dict[str, str] | None  # driver, clocks, power, temperature


class Environment(TypedDict):
    """Where it was measured."""

    device: str
    date: str
    commit: str
    modified: bool  # whether the checkout differed from the commit
    python: str
    system: str
    packages: dict[str, str | None]
    processors: int
    threads: int
    affinity: list[int]  # the processors that this process may use
    load: float  # of the machine in the minute before, in processes
    cuda: Cuda | None


class Peak(TypedDict):
    """The rate that `mfu` is a share of."""

    tflops: float
    of: str
    flops: str  # the convention: what is counted, and whether causal attention is halved


class _Results(TypedDict):
    schema: Literal["fastattn benchmark 3"]
    subject: str
    device: Literal["cpu", "cuda"]
    preset: str
    command: list[str]
    environment: Environment
    method: dict[str, str]
    rows: list[Row]
    skipped: list[Skipped]
    seconds: float


class Results(_Results, total=False):
    """A file."""

    peak: Peak


class SchemaError(ValueError):
    """Data that is no results file; the message names the place."""


def check(data: object, kind: Any = Results, place: str = "results") -> None:
    """Raise SchemaError unless `data` is of the type `kind`."""
    origin = get_origin(kind)
    if kind is Any:
        return
    if isinstance(kind, type) and hasattr(kind, "__required_keys__"):
        if not isinstance(data, dict):
            raise SchemaError(f"{place} must be an object; got {type(data).__name__}")
        hints = get_type_hints(kind)
        missing, unknown = kind.__required_keys__ - data.keys(), data.keys() - hints.keys()
        if missing or unknown:
            said = [f"lacks {', '.join(sorted(missing))}"] if missing else []
            said += [f"has the unknown {', '.join(sorted(map(str, unknown)))}"] if unknown else []
            raise SchemaError(f"{place} {' and '.join(said)}")
        for name, value in data.items():
            check(value, hints[name], f"{place}.{name}")
    elif origin is list:
        if not isinstance(data, list):
            raise SchemaError(f"{place} must be a list; got {type(data).__name__}")
        for number, value in enumerate(data):
            check(value, get_args(kind)[0], f"{place}[{number}]")
    elif origin is dict:
        if not isinstance(data, dict) or any(not isinstance(key, str) for key in data):
            raise SchemaError(f"{place} must be an object; got {type(data).__name__}")
        for name, value in data.items():
            check(value, get_args(kind)[1], f"{place}[{name!r}]")
    elif origin is Literal:
        if data not in get_args(kind):
            raise SchemaError(f"{place} must be {' or '.join(map(repr, get_args(kind)))}")
    elif origin in (Union, types.UnionType):
        failures = []
        for option in get_args(kind):
            try:
                return check(data, option, place)
            except SchemaError as failure:
                failures.append(str(failure))
        raise SchemaError(failures[0])
    elif kind is float:
        if isinstance(data, bool) or not isinstance(data, (int, float)) or not math.isfinite(data):
            raise SchemaError(f"{place} must be a finite number; got {data!r}")
    elif kind is int:
        if isinstance(data, bool) or not isinstance(data, int):
            raise SchemaError(f"{place} must be an integer; got {data!r}")
    elif not isinstance(data, kind):
        raise SchemaError(f"{place} must be of type {kind.__name__}; got {data!r}")


def finite(data: object) -> object:
    """Six significant digits of every number; NaN and infinity, which JSON lacks, as strings."""
    if isinstance(data, float):
        return float(f"{data:.6g}") if math.isfinite(data) else str(data)
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data


def write(path: str | os.PathLike[str], data: Results) -> None:
    """Check, write beside the target, then rename: a reader never sees half a file."""
    clean = finite(data)
    check(clean)
    write_json(path, clean)


def write_json(path: str | os.PathLike[str], data: object) -> None:
    """Any data; as `write`, without the check."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(text_of(finite(data)) + "\n")
    os.replace(partial, target)


def text_of(data: object, margin: str = "") -> str:
    """JSON; an object or a list that fits on a line stays on one."""
    line = json.dumps(data, allow_nan=False)
    if len(margin) + len(line) < WIDTH or not data or not isinstance(data, (dict, list)):
        return line
    within = margin + " "
    if isinstance(data, dict):
        parts = [f"{json.dumps(str(name))}: {text_of(x, within)}" for name, x in data.items()]
        return "{\n" + ",\n".join(within + part for part in parts) + f"\n{margin}}}"
    return "[\n" + ",\n".join(within + text_of(x, within) for x in data) + f"\n{margin}]"


def read(path: str | os.PathLike[str]) -> Results:
    """Raises SchemaError, naming the file, for what is no results file."""
    try:
        data = json.loads(Path(path).read_text())
        check(data)
    except (json.JSONDecodeError, SchemaError) as failure:
        raise SchemaError(f"{path}: {failure}") from failure
    return data
