"""Is an op ever slower than eager PyTorch? A grid of small, odd and large calls of every op.

Every cell must hold t <= 1.05 t_eager + 5 us, the Python around the call included; eager is what a
user of PyTorch writes without us, F.scaled_dot_product_attention for attention. A cell that misses
is measured again, up to four times, each longer, before it counts as missed. The `note` of ours is
the backend that it ran on.

A shape is rows x hidden of a norm, rows x hidden x inner of ffn, rows x in x out of linear,
batch x seqlen x heads x head_dim of attention, where seqlen_q:seqlen_k and heads:kv_heads may
differ.

    python benchmarks/never_slower.py --preset full --backend triton --json F
    python benchmarks/never_slower.py --table F

prints the rows of fastattn/measured.py by which the automatic choice leaves to torch what is slower
on that device. (`--backend`: else what an older table declines would not be measured.)
With `--backend cuda`, Triton takes part as a peer, and

    python benchmarks/never_slower.py --faster F

prints its rows by which the automatic choice takes `cuda`.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import attention
import checkout  # noqa: F401
import decode
import ffn
import layer_norm
from harness import BOTH, FORWARD, OURS, Cell
from never_slower_table import NEXT, RAN_ON, faster, print_table, table
from peer import Outputs, Peer, with_compiled
from schema import Row
from script import Axis, Grid, Subject, boolean, main
from torch import Tensor
from torch.nn import functional as F

import fastattn
from fastattn.backends import NAMES, explanation_of, use_backend
from fastattn.cli.pipe import quietly
from fastattn.timing import Sample, Spread

FACTOR, ALLOWANCE = 1.05, 5e-6
RULE = "t <= 1.05 t_eager + 5 us"
EAGER = "eager"
AUTO = "auto"

Make = Callable[[Any], Peer]


def excess(samples: Mapping[str, Sample]) -> float:
    """Seconds by which a call passes the rule (negative: it holds), the median of the rounds."""
    pairs = zip(samples[OURS].seconds, samples[EAGER].seconds, strict=True)
    return Spread.of(ours - FACTOR * eager - ALLOWANCE for ours, eager in pairs).median


# --- cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Judged(Cell):
    """The rule, for a cell of any op; `backend` is who is made to run ours."""

    target: str | None = RULE
    backend: str = AUTO

    bound = None
    rounds = 25
    batch_seconds = 1e-3

    @property
    def axes(self) -> dict[str, Any]:
        forced = {} if self.backend == AUTO else {"backend": self.backend}
        return {**super().axes, **forced}

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        return EAGER in samples and excess(samples) <= 0

    def measure(self, seconds: float, peers: Collection[str] | None = None) -> Row:
        """As any cell; eager takes part in any case, and ours says what it ran on."""
        row = super().measure(seconds, None if peers is None else {*peers, EAGER})
        row["peers"][OURS]["note"] = RAN_ON + str(self.runs_on())
        return row

    def runs_on(self) -> str | None:
        """The backend of ours: the very call that is timed, put to `explain` instead."""
        inputs = (x.requires_grad_(self.backward) for x in self.inputs())
        explain = functools.partial(explanation_of, getattr(fastattn, self.op))
        peer = self.against[OURS](self)
        with mock.patch.object(fastattn, self.op, explain), peer.context():
            return peer.function(*inputs).backend  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class Norm(Judged, layer_norm.NormCell):
    """layer_norm or rms_norm."""


@dataclass(frozen=True, kw_only=True)
class ResidualRMSNorm(Norm):
    """rms_norm of a sum that is returned too."""

    def inputs(self) -> tuple[Tensor, ...]:
        x, weight = super().inputs()
        residual, _ = super().inputs()
        return x, weight, residual

    def definition(self, x: Tensor, weight: Tensor, residual: Tensor) -> Outputs:  # type: ignore[override]
        return super().definition(x + residual, weight), x + residual  # type: ignore[return-value]

    def plain(self, *inputs: Tensor) -> Outputs:
        return residual_rms_norm_eager(self).function(*inputs)


def residual_rms_norm_ours(cell: ResidualRMSNorm) -> Peer:
    return Peer(lambda x, w, r: fastattn.rms_norm(x, w, layer_norm.EPS, residual=r))


def residual_rms_norm_eager(cell: ResidualRMSNorm) -> Peer:
    def call(x: Tensor, w: Tensor, r: Tensor) -> Outputs:
        total = x + r
        return F.rms_norm(total, (cell.hidden,), w, layer_norm.EPS), total

    return Peer(call)


@dataclass(frozen=True, kw_only=True)
class FeedForward(Judged, ffn.FeedForwardCell):
    """ffn."""


@dataclass(frozen=True, kw_only=True)
class LinearCell(Cell):
    """linear, with a bias and an activation."""

    rows: int
    in_features: int
    out_features: int
    activation: str

    sizes = ("rows", "in_features", "out_features", "activation")

    def inputs(self) -> tuple[Tensor, ...]:
        x, bias = self.randn(self.rows, self.in_features), self.randn(self.out_features)
        weight = self.randn(self.out_features, self.in_features) / math.sqrt(self.in_features)
        return x, weight, bias

    def gradients(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self.randn(self.rows, self.out_features),)

    def definition(self, *inputs: Tensor) -> Outputs:
        return linear_eager(self).function(*inputs)


@dataclass(frozen=True, kw_only=True)
class Linear(Judged, LinearCell):
    """linear."""


def linear_ours(cell: LinearCell) -> Peer:
    return Peer(lambda *inputs: fastattn.linear(*inputs, cell.activation))


def linear_eager(cell: LinearCell) -> Peer:
    activation = ffn.ACTIVATIONS[cell.activation]
    return Peer(lambda x, weight, bias: activation(F.linear(x, weight, bias)))


@dataclass(frozen=True, kw_only=True)
class SelfAttention(Judged, attention.AttentionCell):
    """As many queries as keys."""


@dataclass(frozen=True, kw_only=True)
class Attention(SelfAttention):
    """`seqlen_q` queries on `seqlen` keys, the last query at the last key where it is causal."""

    seqlen_q: int

    page_size = 0  # as peers of decoding ask
    flops = None

    @property
    def axes(self) -> dict[str, Any]:
        return {"seqlen_q": self.seqlen_q, **super().axes}

    def inputs(self) -> tuple[Tensor, ...]:
        q, k, v = super().inputs()
        return q[:, : self.seqlen_q].contiguous(), k, v

    def seen(self) -> Tensor | None:
        seen = super().seen()
        return None if seen is None else seen[self.seqlen - self.seqlen_q :]


def attention_eager(cell: Attention) -> Peer:
    """SDPA's causality starts at the top left corner: a mask instead, unless all is seen."""
    return decode.sdpa(cell) if cell.causal else attention.sdpa(cell)  # type: ignore[arg-type]


# --- the grid -------------------------------------------------------------------------------------

OPS = ("attention", "layer_norm", "rms_norm", "ffn", "linear")
AXES: Mapping[str, Axis] = {
    "op": Axis("the op", kind=str, choices=OPS),
    "shape": Axis("e.g. 33x1023, 64x256x1024 or 1x1:257x8:2x64; of the ops that it fits", kind=str),
    "residual": Axis("a norm adds one first", kind=boolean),
    "causal": Axis("attention", kind=boolean),
    "activation": Axis("of ffn and linear", kind=str, choices=tuple(ffn.ACTIVATIONS)),
    "layout": Axis("of ffn's weights", kind=str, choices=("linear", "conv1d")),
    "direction": Axis("what is timed", kind=str, choices=(FORWARD, BOTH)),
    "dtype": Axis("of the tensors", kind=str, choices=("bfloat16", "float16", "float32")),
    "backend": Axis("that ours runs on", kind=str, choices=(AUTO, *NAMES)),
    "compile": Axis("have torch.compile take part; seconds to compile a row", kind=boolean),
}


def make(
    *,
    device: str,
    op: str,
    shape: str,
    direction: str,
    dtype: str,
    backend: str,
    compile: bool,
    residual: bool = False,
    causal: bool = False,
    activation: str = "gelu_tanh",
    layout: str = "linear",
) -> Judged | None:
    """The cell of one value for each axis; None for a shape of another op."""
    sizes = [tuple(map(int, part.split(":"))) for part in shape.split("x")]
    if len(sizes) != {"ffn": 3, "linear": 3, "attention": 4}.get(op, 2):
        return None
    kind: type[Judged]
    if op == "attention":
        (batch,), seqlens, heads, (head_dim,) = sizes
        own = {"batch": batch, "heads": heads[0], "kv_heads": heads[-1], "head_dim": head_dim}
        own |= {"seqlen": seqlens[-1], "causal": causal}
        kind, ours, eager = SelfAttention, attention.ours, attention.sdpa
        if len(seqlens) > 1:
            own["seqlen_q"] = seqlens[0]
            kind, eager = Attention, attention_eager
    elif op == "ffn":
        own = dict(zip(("rows", "hidden", "inner"), (size for (size,) in sizes)))
        own |= {"activation": activation, "layout": layout}
        kind, ours, eager = FeedForward, ffn.ours, ffn.eager
    elif op == "linear":
        own = dict(zip(("rows", "in_features", "out_features"), (size for (size,) in sizes)))
        own |= {"activation": activation}
        kind, ours, eager = Linear, linear_ours, linear_eager
    else:
        own = dict(zip(("rows", "hidden"), (size for (size,) in sizes))) | {"residual": residual}
        kind, ours, eager = Norm, layer_norm.ours, layer_norm.eager
        if op == "rms_norm" and residual:
            kind = ResidualRMSNorm
            ours, eager = residual_rms_norm_ours, residual_rms_norm_eager
    against = {OURS: forced(ours, backend), EAGER: eager}
    if backend == "cuda":
        against[NEXT] = forced(ours, NEXT)
    return kind(
        op=op, device=device, dtype=dtype, direction=direction, backend=backend,
        against=with_compiled(against, compile), **own,
    )  # fmt: skip


def forced(make: Make, backend: str) -> Make:
    """Ours, made to run on `backend`."""
    if backend == AUTO:
        return make
    return lambda cell: replace(make(cell), context=lambda: use_backend(backend))


def grid(op: str, *shapes: str, **axes: Sequence[Any]) -> Grid:
    """The shapes of an op; of the axes not named, what is common."""
    common: dict[str, Sequence[Any]] = {
        "backend": [AUTO], "compile": [False], "direction": [FORWARD, BOTH],
    }  # fmt: skip
    return {**common, "op": [op], "shape": shapes, **axes}


def norms(*shapes: str, **axes: Sequence[Any]) -> list[Grid]:
    return [grid(op, *shapes, **axes) for op in ("layer_norm", "rms_norm")]


def quick(**axes: Sequence[Any]) -> list[Grid]:
    """A few of each kind; the cost of the call first."""
    return [
        *norms("1x768", "33x1023", residual=[False], **axes),
        *norms("64x768", residual=[True], **axes),
        grid("attention", "1x128x12x64", "1x1:257x12x64", causal=[True], **axes),
        grid("ffn", "1x768x3072", layout=["conv1d"], **axes),
        grid("ffn", "33x100x401", activation=["gelu"], **axes),
        grid("attention", "2x17x3x59", causal=[False], **axes),
        grid("attention", "1x128x8:2x64", causal=[True], **axes),
        grid("ffn", "256x256x1024", **axes),
        grid("linear", "1x768x3072", "33x100x401", activation=["gelu"], **axes),
        *norms("512x768", residual=[False], **axes),
    ]


def full(
    normal: Sequence[str],
    added: Sequence[str],
    fed: Sequence[str],
    whole: Sequence[str],
    causal: Sequence[str],
    **axes: Sequence[Any],
) -> list[Grid]:
    """Shapes of the norms, with a residual, of ffn and linear, of attention, causal and not."""
    return [
        *norms(*normal, residual=[False], **axes),
        *norms(*added, residual=[True], **axes),
        grid("ffn", *fed, **axes),
        grid("ffn", "1x768x3072", "256x256x1024", layout=["conv1d"], **axes),
        grid("ffn", "33x100x401", activation=["gelu"], **axes),
        grid("ffn", "64x256x1024", activation=["relu", "silu"], layout=["linear", "conv1d"],
             **axes),
        grid("linear", *fed, activation=["gelu_tanh", "relu"], **axes),
        grid("linear", "33x100x401", activation=["gelu", "silu"], **axes),
        # Its gradients are 0 but for v's, and errors of a zero have no scale: only forward.
        grid("attention", "1x1x1x16", causal=[False], direction=[FORWARD], **axes),
        grid("attention", *whole, causal=[False], **axes),
        grid("attention", *causal, causal=[True], **axes),
    ]  # fmt: skip


def compiled(**axes: Sequence[Any]) -> list[Grid]:
    """One shape of each op with torch.compile; the other grids have these cells without it."""
    axes = {**axes, "compile": [True]}
    return [
        *norms("512x768", residual=[False], **axes),
        *norms("64x768", residual=[True], **axes),
        grid("ffn", "256x256x1024", **axes),
        grid("linear", "256x256x1024", **axes),
        grid("attention", "2x256x12x64", causal=[True], **axes),
    ]


# One row, odd sizes, many rows; only a GPU gets calls that take a CPU more than a second.
WHOLE = ("2x17x3x59", "1x333x3x80", "2x5:64x4x64", "1x512x4x64")
CAUSAL = (
    "1x8x2x32", "4x64x4x64", "1x128x12x64", "1x128x8:2x64", "1x1:257x12x64", "2x5:64x4x64",
    "64x16x4x32", "2x256x12x64",
)  # fmt: skip
ROWS = ("1x64", "1x768", "7x1000", "16x59", "33x1023", "64x768", "512x768", "3x50257")
ADDED = ("1x768", "64x768", "33x1023", "512x768")
FED = ("1x16x64", "1x768x3072", "256x256x1024", "4096x64x256")
CPU = {"dtype": ("float32", "bfloat16")}  # few CPUs compute in float16
PRESETS = {
    ("cuda", "quick"): quick(dtype=["bfloat16", "float32"]),
    ("cuda", "full"): [
        *compiled(dtype=["bfloat16", "float32"]),
        *full(
            (*ROWS, "2048x1024", "16x8192", "8192x4096", "65536x768"),
            (*ADDED, "8192x4096"),
            (*FED, "512x384x1536", "1024x1024x4096", "65536x768x3072"),
            (*WHOLE, "4x1024:4096x16x128", "16x4096x8x64"),
            (*CAUSAL, "4x1024x16x128", "8x8192x8x128", "16x1:4096x32:8x128"),
            dtype=["bfloat16", "float16", "float32"],
        ),
    ],
    ("cpu", "quick"): quick(**CPU),
    ("cpu", "full"): [
        *compiled(dtype=["float32"]),
        *full(
            (*ROWS, "2048x1024", "65536x64"),
            ADDED,
            (*FED, "512x384x1536", "65536x16x64"),
            WHOLE,
            (*CAUSAL, "1x1024x2x128"),
            **CPU,
        ),
    ],
}
SUBJECT = Subject("never_slower", __doc__, AXES, PRESETS, make, seconds={"cpu": 0.5, "cuda": 0.3})


# --- the command line -----------------------------------------------------------------------------


def run(argv: Sequence[str]) -> int:
    """`--table FILE...`, `--faster FILE...`, or what every script does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--table", nargs="+", type=Path)
    parser.add_argument("--faster", nargs="+", type=Path)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.table:
        return print_table(SUBJECT.name, arguments.table, table)
    if arguments.faster:
        return print_table(SUBJECT.name, arguments.faster, faster)
    return main(SUBJECT, rest)


if __name__ == "__main__":
    raise SystemExit(quietly(lambda: run(sys.argv[1:])))
