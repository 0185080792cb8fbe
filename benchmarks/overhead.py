"""The cost of a call on the host, on tensors so small that nothing else is left.

Three tables (`--table`):

- default: the call that everybody makes, interleaved with the bare ATen calls that do the same: at
  most 5 us above them, forward without and with gradients, and forward and backward;
- kernel: the registered op of a kernel backend (torch.ops.fastattn.*), its launchers replaced by
  ones that return results made beforehand; torch.library, autograd and our own Python are left: at
  most 15 us a call without gradients, 30 us with;
- public: our public call of the same, for which nothing is promised.

On a GPU too it is the host's time that is taken, not the device's. On a CPU the kernels exist
only in Triton's interpreter, and none of them runs while the clock does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from unittest import mock

import checkout  # noqa: F401
import torch
from harness import OURS, Cell, as_tuple, timed_interleaved
from peer import Outputs, first
from schema import Entry, Row
from script import Axis, Grid, Subject, main
from torch import Tensor
from torch.nn import functional as F

import fastattn
from fastattn.timing import Candidate, Sample, difference

ATEN = "ATen"
DEFAULT, KERNEL, PUBLIC = TABLES = ("default", "kernel", "public")
FORWARD, WITH_GRAD, BOTH = MODES = ("forward", "forward, grad", "forward+backward")
ABOVE_US = 5.0  # of the default table, over ATen
KERNEL_US = {FORWARD: 15.0, WITH_GRAD: 30.0}

Function = Callable[..., Outputs]


# --- calls ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """One op on tiny inputs.

    `bare` does the same with ATen only; `registered` calls the op of torch.library, whose
    launchers are `forward` and `backward` of `kernels`. `aside` does less, and is timed too.
    """

    inputs: tuple[Tensor, ...]
    ours: Function
    bare: Function
    registered: Function
    kernels: ModuleType
    aside: Mapping[str, Function] = field(default_factory=dict)


def attention_calls(device: str) -> Calls:
    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.attention.call import Extras, Settings

    registered = torch.ops.fastattn.attention
    # No extras; causal, nothing else, by the Triton kernels.
    call = (*Extras(), *Settings(-1, 0, False, 0.25, 0.0, 0.0, "ieee", 0, 0, 0, 0), "triton", True)
    sdpa = F.scaled_dot_product_attention

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return sdpa(q, k, v, is_causal=True).transpose(1, 2)

    return Calls(
        inputs=tuple(torch.randn(1, 8, 2, 16, device=device) for _ in range(3)),
        ours=lambda q, k, v: fastattn.attention(q, k, v, causal=True),
        bare=bare,
        registered=lambda q, k, v: registered(q, k, v, *call),
        kernels=kernels,
        # The same tensors read as (batch, heads, seqlen, head_dim): other numbers, but the cost of
        # the call for a caller who has that layout anyway.
        aside={"ATen without transposes": lambda q, k, v: sdpa(q, k, v, is_causal=True)},
    )


def layer_norm_calls(device: str) -> Calls:
    return _norm_calls(device, fastattn.layer_norm, torch.layer_norm, centred=True)


def rms_norm_calls(device: str) -> Calls:
    return _norm_calls(device, fastattn.rms_norm, torch.rms_norm, centred=False)


def _norm_calls(device: str, ours: Function, bare: Function, *, centred: bool) -> Calls:
    from fastattn.ops.layer_norm import triton as kernels

    registered, f32 = torch.ops.fastattn.layer_norm, torch.float32

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Outputs:
        return registered(x, None, weight, bias, None, 0.0, 1e-5, centred, f32, "triton", True)

    shapes = ((4, 64), 64, 64) if centred else ((4, 64), 64)
    return Calls(
        inputs=tuple(torch.randn(shape, device=device) for shape in shapes),
        ours=ours,
        bare=lambda x, *weights: bare(x, (64,), *weights),
        registered=kernel,
        kernels=kernels,
    )


def ffn_calls(device: str) -> Calls:
    from fastattn.ops.ffn import triton as kernels

    registered = torch.ops.fastattn.ffn
    options = ("gelu_tanh", "linear", True, "triton", True)

    def bare(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    shapes = ((4, 16), (64, 16), 64, (16, 64), 16)
    return Calls(
        inputs=tuple(torch.randn(shape, device=device) for shape in shapes),
        ours=fastattn.ffn,
        bare=bare,
        registered=lambda *inputs: registered(*inputs, None, None, *options),
        kernels=kernels,
    )


CALLS = {
    "attention": attention_calls,
    "layer_norm": layer_norm_calls,
    "rms_norm": rms_norm_calls,
    "ffn": ffn_calls,
}


def in_mode(function: Function, inputs: Sequence[Tensor], mode: str) -> Callable[[], Outputs]:
    """`function(*inputs)` as a call without arguments, with gradients as `mode` has them."""
    inputs = tuple(x.detach().requires_grad_(mode != FORWARD) for x in inputs)
    if mode != BOTH:
        return lambda: function(*inputs)
    grad = torch.ones_like(first(function(*inputs)))
    return lambda: torch.autograd.grad(first(function(*inputs)), inputs, grad)


@contextmanager
def launchers_replaced(kernels: ModuleType) -> Iterator[None]:
    """The launchers run once and from then on answer with that result."""

    def answering(launch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        answers: list[tuple[Tensor, ...]] = []

        def launcher(*arguments: object) -> tuple[Tensor, ...]:
            if not answers:
                answers.append(launch(*arguments))
            return answers[0]

        return launcher

    with (
        mock.patch.object(kernels, "forward", answering(kernels.forward)),
        mock.patch.object(kernels, "backward", answering(kernels.backward)),
    ):
        yield


@contextmanager
def drained() -> Iterator[None]:
    """A GPU's queue is empty when a batch begins, so that the host never waits for a place."""
    torch.cuda.synchronize()
    yield


# --- cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Call(Cell):
    """One line of a table; `device` says whose clock it is, `on` where the tensors are."""

    table: str
    on: str
    most_us: float | None  # the promise; None if there is none

    sizes = ("table",)
    reference = None
    limit = 60.0
    rounds = 41

    @property
    def title(self) -> str:
        return f"{self.op} {self.direction} table={self.table}"

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        assert self.most_us is not None
        ours = samples[OURS].median
        if self.table == DEFAULT:
            ours = difference(samples[OURS], samples[ATEN]).median
        return 1e6 * ours <= self.most_us

    def measure(self, seconds: float, peers: Collection[str] | None = None) -> Row:
        """The row of this call. There is nobody to choose among: `peers` is not read."""
        if self.on == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, with the kernels
        calls = CALLS[self.op](self.on)
        functions = {OURS: calls.registered if self.table == KERNEL else calls.ours}
        around: AbstractContextManager[object] = nullcontext()
        if self.table == DEFAULT:
            functions |= {ATEN: calls.bare, **calls.aside}
        else:
            around = launchers_replaced(calls.kernels)
        with around, fastattn.use_backend("triton") if self.table == PUBLIC else nullcontext():
            callables = {n: in_mode(f, calls.inputs, self.direction) for n, f in functions.items()}
            results = {name: as_tuple(call()) for name, call in callables.items()}
            right = self.table != DEFAULT or all(map(close, results[OURS], results[ATEN]))
            ours: Entry = {"right": right}
            row = self.row({OURS: ours, **{name: Entry() for name in functions if name != OURS}})
            row["right"] = right
            for name in calls.aside.keys() & functions.keys():
                row["peers"][name]["ceiling"] = True
            candidates = [Candidate(name, call) for name, call in callables.items()]
            if self.on == "cuda":
                ours["note"] = "host time"
                candidates = [replace(candidate, context=drained) for candidate in candidates]
            samples = timed_interleaved(self, candidates, seconds, row)
        if ATEN in samples:
            above: Any = difference(samples[OURS], samples[ATEN]).as_dict(1e6)
            row["peers"][ATEN]["above_us"] = above
        return row


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "op": Axis("whose call", kind=str, choices=tuple(CALLS)),
    "mode": Axis("what is called", kind=str, choices=MODES),
    "table": Axis("which of the three", kind=str, choices=TABLES),
}


def make(*, device: str, op: str, mode: str, table: str) -> Call:
    """The cell of one value for each axis."""
    most = {DEFAULT: ABOVE_US, KERNEL: KERNEL_US.get(mode)}.get(table)
    above = " above ATen" if table == DEFAULT else ""
    return Call(
        op=op, device="cpu", dtype="float32", direction=mode, against={}, table=table, on=device,
        most_us=most, target=None if most is None else f"at most {most:g} us{above}",
    )  # fmt: skip


GRID: Grid = {"table": TABLES, "op": tuple(CALLS), "mode": MODES}
PRESETS = {(device, preset): [GRID] for device in ("cpu", "cuda") for preset in ("quick", "full")}
SUBJECT = Subject("overhead", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT, ["--threads", "1", *sys.argv[1:]]))
