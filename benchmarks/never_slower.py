"""Are fastattn's ops ever slower than eager PyTorch on this CPU?

Every cell of a grid (op, shape, dtype, forward or forward and backward) must hold
t <= 1.05 t_eager + 5 us, the Python around the call included. Both sides run by turns in one
process; a cell that fails is measured again, longer, before it counts as failed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import checkout  # noqa: F401
import numpy
import torch
from environment import environment
from results import table, write_json
from timing import Candidate, Sample, Spread, interleave, ratio
from torch import Tensor
from torch.nn import functional as F

import fastattn

FACTOR, ALLOWANCE = 1.05, 5e-6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTEMPTS = 4

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """The same job done by us and by eager PyTorch, on the same tensors."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]


@dataclass(frozen=True)
class Cell:
    op: str
    shape: str
    dtype: str
    backward: bool
    make: Callable[[torch.dtype], Case]

    @property
    def mode(self) -> str:
        return "forward+backward" if self.backward else "forward"


def layer_norm_case(dtype: torch.dtype, rows: int, hidden: int, residual: bool = False) -> Case:
    x, r = torch.randn(2, rows, hidden, dtype=dtype)
    weight, bias = torch.randn(2, hidden, dtype=dtype)
    if not residual:
        return Case(
            (x, weight, bias),
            lambda x, w, b: fastattn.layer_norm(x, w, b),
            lambda x, w, b: F.layer_norm(x, (hidden,), w, b),
        )

    def eager(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Outputs:
        total = x + r
        return F.layer_norm(total, (hidden,), w, b), total

    return Case(
        (x, r, weight, bias), lambda x, r, w, b: fastattn.layer_norm(x, w, b, residual=r), eager
    )


def rms_norm_case(dtype: torch.dtype, rows: int, hidden: int, residual: bool = False) -> Case:
    x, r = torch.randn(2, rows, hidden, dtype=dtype)
    weight = torch.randn(hidden, dtype=dtype)
    if not residual:
        return Case(
            (x, weight),
            lambda x, w: fastattn.rms_norm(x, w),
            lambda x, w: F.rms_norm(x, (hidden,), w),
        )

    def eager(x: Tensor, r: Tensor, w: Tensor) -> Outputs:
        total = x + r
        return F.rms_norm(total, (hidden,), w), total

    return Case((x, r, weight), lambda x, r, w: fastattn.rms_norm(x, w, residual=r), eager)


def ffn_case(
    dtype: torch.dtype,
    rows: int,
    hidden: int,
    inner: int,
    activation: str = "gelu_tanh",
    layout: str = "linear",
) -> Case:
    x = torch.randn(rows, hidden, dtype=dtype)
    w1 = torch.randn(inner, hidden, dtype=dtype) / math.sqrt(hidden)
    w2 = torch.randn(hidden, inner, dtype=dtype) / math.sqrt(inner)
    b1, b2 = torch.randn(inner, dtype=dtype), torch.randn(hidden, dtype=dtype)
    act: Callable[[Tensor], Tensor] = {
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
    }[activation]
    if layout == "conv1d":
        w1, w2 = w1.t().contiguous(), w2.t().contiguous()

    def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        if layout == "linear":
            return F.linear(act(F.linear(x, w1, b1)), w2, b2)
        return torch.addmm(b2, act(torch.addmm(b1, x, w1)), w2)

    return Case(
        (x, w1, b1, w2, b2),
        lambda *inputs: fastattn.ffn(*inputs, activation, layout=layout),
        eager,
    )


def attention_case(
    dtype: torch.dtype,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
) -> Case:
    q = torch.randn(batch, seqlen_q, heads, head_dim, dtype=dtype)
    k, v = torch.randn(2, batch, seqlen_k, kv_heads, head_dim, dtype=dtype)
    # What SDPA calls causal starts at the top left corner: with other lengths the user of eager
    # PyTorch passes a mask (made outside the time), or nothing where one query sees every key.
    square = seqlen_q == seqlen_k
    mask = None
    if causal and not square and seqlen_q > 1:
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and square,
            enable_gqa=heads != kv_heads,
        ).transpose(1, 2)

    return Case((q, k, v), lambda q, k, v: fastattn.attention(q, k, v, causal=causal), eager)


NORM_SHAPES = [
    # rows, hidden, residual
    (1, 64, False),
    (1, 768, False),
    (7, 1000, False),
    (64, 768, False),
    (64, 768, True),
    (33, 1023, False),
    (512, 768, False),
    (512, 768, True),
    (2048, 1024, False),
    (3, 50257, False),
]
FFN_SHAPES = [
    # rows, hidden, inner, activation, layout
    (1, 16, 64, "gelu_tanh", "linear"),
    (1, 768, 3072, "gelu_tanh", "linear"),
    (1, 768, 3072, "gelu_tanh", "conv1d"),
    (33, 100, 401, "gelu", "linear"),
    (64, 256, 1024, "relu", "linear"),
    (64, 256, 1024, "silu", "conv1d"),
    (256, 256, 1024, "gelu_tanh", "linear"),
    (256, 256, 1024, "gelu_tanh", "conv1d"),
    (512, 384, 1536, "gelu", "conv1d"),
]
ATTENTION_SHAPES = [
    # batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, causal
    (1, 1, 1, 1, 1, 16, False),
    (1, 8, 8, 2, 2, 32, True),
    (2, 17, 17, 3, 3, 59, False),
    (4, 64, 64, 4, 4, 64, True),
    (1, 128, 128, 12, 12, 64, True),
    (2, 256, 256, 12, 12, 64, True),
    (1, 512, 512, 4, 4, 64, False),
    (1, 1024, 1024, 2, 2, 128, True),
    (1, 128, 128, 8, 2, 64, True),
    (1, 1, 257, 12, 12, 64, True),
    (2, 5, 64, 4, 4, 64, True),
]


def grid() -> Iterator[Cell]:
    """Every cell, the cheap ops first."""
    shapes: list[tuple[str, str, Callable[[torch.dtype], Case]]] = []
    for op, build in (("layer_norm", layer_norm_case), ("rms_norm", rms_norm_case)):
        for rows, hidden, residual in NORM_SHAPES:
            name = f"{rows}x{hidden}" + (" residual" if residual else "")
            shapes.append((op, name, _with(build, rows, hidden, residual)))
    for rows, hidden, inner, activation, layout in FFN_SHAPES:
        name = f"{rows}x{hidden}x{inner} {activation} {layout}"
        shapes.append(("ffn", name, _with(ffn_case, rows, hidden, inner, activation, layout)))
    for shape in ATTENTION_SHAPES:
        batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, causal = shape
        name = f"{batch}x{seqlen_q}:{seqlen_k}x{heads}:{kv_heads}x{head_dim}"
        name += " causal" if causal else ""
        shapes.append(("attention", name, _with(attention_case, *shape)))
    for op, name, make in shapes:
        for dtype in DTYPES:
            for backward in (False, True):
                yield Cell(op, name, dtype, backward, make)


def _with(build: Callable[..., Case], *arguments: object) -> Callable[[torch.dtype], Case]:
    return lambda dtype: build(dtype, *arguments)


def candidates(cell: Cell) -> list[Candidate]:
    """Ours and eager as calls without arguments, on the same inputs and output gradients."""
    torch.manual_seed(0)
    case = cell.make(DTYPES[cell.dtype])
    inputs = tuple(x.requires_grad_(cell.backward) for x in case.inputs)
    grads = tuple(torch.randn_like(out) for out in _tuple(case.eager(*inputs)))

    def call(function: Callable[..., Outputs]) -> Callable[[], object]:
        if not cell.backward:
            return lambda: function(*inputs)
        return lambda: torch.autograd.grad(_tuple(function(*inputs)), inputs, grads)

    return [Candidate("ours", call(case.ours)), Candidate("eager", call(case.eager))]


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def excess(times: dict[str, Sample]) -> float:
    """Seconds by which a call passes the rule (negative: it holds), the median of the rounds."""
    pairs = zip(times["ours"].seconds, times["eager"].seconds, strict=True)
    return Spread.of(ours - FACTOR * eager - ALLOWANCE for ours, eager in pairs).median


def measure(cell: Cell, seconds: float) -> dict:
    """One row of the results: a cell that fails is measured up to `ATTEMPTS` times."""
    pair = candidates(cell)
    attempts = 0
    while True:
        attempts += 1
        times = interleave(
            pair, rounds=25 * attempts, batch_seconds=1e-3, seconds=seconds * attempts
        )
        over = excess(times)
        if over <= 0 or attempts == ATTEMPTS:
            break
    return {
        "op": cell.op,
        "shape": cell.shape,
        "dtype": cell.dtype,
        "mode": cell.mode,
        "ours": times["ours"].as_dict(),
        "eager": times["eager"].as_dict(),
        "ratio": ratio(times["ours"], times["eager"]).as_dict(),
        "excess_us": over * 1e6,
        "attempts": attempts,
        "holds": over <= 0,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="OP", help="cells of one op")
    parser.add_argument("--stride", type=int, default=1, help="take every N-th cell (default 1)")
    parser.add_argument("--seconds", type=float, default=0.5, help="per cell (default 0.5)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cells = [cell for cell in grid() if arguments.only in (None, cell.op)][:: arguments.stride]
    if not cells:
        parser.error(f"no cell of {arguments.only!r}; ops: {', '.join(ops())}")

    started = time.monotonic()
    rows: list[dict] = []
    for number, cell in enumerate(cells, 1):
        rows.append(measure(cell, arguments.seconds))
        if sys.stderr.isatty():
            end = "\n" if number == len(cells) else ""
            print(f"\r{number}/{len(cells)} cells", end=end, file=sys.stderr, flush=True)

    failed = [row for row in rows if not row["holds"]]
    ratios = [row["ratio"]["median"] for row in rows]
    summary = {
        "cells": len(rows),
        "failed": len(failed),
        "geometric_mean": float(numpy.exp(numpy.mean(numpy.log(ratios)))),
        "worst": max(rows, key=lambda row: row["excess_us"]),
        "seconds": time.monotonic() - started,
    }
    print(table(HEADERS, [shown(row) for row in rows]))
    print(f"\n{len(rows)} cells in {summary['seconds']:.0f} s; time relative to eager PyTorch:")
    print(f"geometric mean {summary['geometric_mean']:.3f}")
    print("worst cell: " + " ".join(shown(summary["worst"])))
    print(f"t <= {FACTOR} t_eager + {ALLOWANCE * 1e6:.0f} us: {len(failed)} cells fail")
    if arguments.json:
        data = {"script": "never_slower", "environment": environment("cpu"), "rows": rows}
        write_json(arguments.json, data | {"summary": summary})
    return 1 if failed else 0


HEADERS = ("op", "shape", "dtype", "mode", "ours us", "eager us", "ratio", "20-80%", "")


def ops() -> list[str]:
    return sorted({cell.op for cell in grid()})


def shown(row: dict) -> list[str]:
    spread = row["ratio"]
    return [
        row["op"],
        row["shape"],
        row["dtype"],
        row["mode"],
        f"{row['ours']['median_us']:.1f}",
        f"{row['eager']['median_us']:.1f}",
        f"{spread['median']:.3f}",
        f"{spread['p20']:.2f}-{spread['p80']:.2f}",
        "" if row["holds"] else f"FAILS by {row['excess_us']:.1f} us",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
