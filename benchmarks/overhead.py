"""What a call costs on the host, on tensors so small that nothing else is left.

Two tables:

- the default backend of every op against the bare ATen calls that do the same, by turns:
  the difference may be 5 us, forward without and with gradients, and forward and backward;
- the registered ops of the kernel backends (torch.ops.fastattn.*), their launchers replaced by
  ones that return results made beforehand, so that what is left is torch.library, autograd and
  our own Python: 15 us a call without gradients, 30 us with.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from unittest import mock

# On a CPU the Triton backend exists in the interpreter alone; not one of its kernels runs here.
os.environ["TRITON_INTERPRET"] = "1"

import checkout  # noqa: F401
import torch
from environment import environment
from results import table, write_json
from timing import Candidate, difference, interleave
from torch import Tensor
from torch.nn import functional as F

import fastattn

DEFAULT_LIMIT_US = 5.0
KERNEL_LIMITS_US = {"forward": 15.0, "forward, grad": 30.0}
MODES = ("forward", "forward, grad", "forward+backward")
ATTEMPTS = 4

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op on tiny inputs.

    `bare` does the same with ATen alone; `registered` calls the op of torch.library, whose
    launchers are `forward` and `backward` of `kernels`. `aside` is shown and has no limit.
    """

    op: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Outputs]
    bare: Callable[..., Outputs]
    registered: Callable[..., Outputs]
    kernels: ModuleType
    aside: dict[str, Callable[..., Outputs]] = field(default_factory=dict)


def attention_case() -> Case:
    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.attention.call import Extras, Settings

    registered = torch.ops.fastattn.attention
    # No extras; causal, nothing else, by the Triton kernels.
    call = (*Extras(), *Settings(-1, 0, False, 0.25, 0.0, 0.0, "ieee", 0, 0, 0, 0), "triton", True)
    sdpa = F.scaled_dot_product_attention

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return sdpa(q, k, v, is_causal=True).transpose(1, 2)

    return Case(
        op="attention",
        inputs=tuple(torch.randn(1, 8, 2, 16) for _ in range(3)),
        ours=lambda q, k, v: fastattn.attention(q, k, v, causal=True),
        bare=bare,
        registered=lambda q, k, v: registered(q, k, v, *call),
        kernels=kernels,
        # The same tensors read as (batch, heads, seqlen, head_dim): other numbers, but the cost of
        # the call for a caller who has that layout anyway.
        aside={"ATen without transposes": lambda q, k, v: sdpa(q, k, v, is_causal=True)},
    )


def layer_norm_case() -> Case:
    from fastattn.ops.layer_norm import triton as kernels

    registered = torch.ops.fastattn.layer_norm
    f32 = torch.float32
    return Case(
        op="layer_norm",
        inputs=(torch.randn(4, 64), torch.randn(64), torch.randn(64)),
        ours=fastattn.layer_norm,
        bare=lambda x, w, b: torch.layer_norm(x, (64,), w, b),
        registered=lambda x, w, b: registered(x, None, w, b, 1e-5, True, f32, "triton", True),
        kernels=kernels,
    )


def rms_norm_case() -> Case:
    from fastattn.ops.layer_norm import triton as kernels

    registered = torch.ops.fastattn.layer_norm
    f32 = torch.float32
    return Case(
        op="rms_norm",
        inputs=(torch.randn(4, 64), torch.randn(64)),
        ours=fastattn.rms_norm,
        bare=lambda x, w: torch.rms_norm(x, (64,), w),
        registered=lambda x, w: registered(x, None, w, None, 1e-5, False, f32, "triton", True),
        kernels=kernels,
    )


def ffn_case() -> Case:
    from fastattn.ops.ffn import triton as kernels

    registered = torch.ops.fastattn.ffn
    options = ("gelu_tanh", "linear", True, "triton", True)

    def bare(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    w1, w2 = torch.randn(64, 16), torch.randn(16, 64)
    return Case(
        op="ffn",
        inputs=(torch.randn(4, 16), w1, torch.randn(64), w2, torch.randn(16)),
        ours=fastattn.ffn,
        bare=bare,
        registered=lambda *inputs: registered(*inputs, *options),
        kernels=kernels,
    )


CASES = {
    "attention": attention_case,
    "layer_norm": layer_norm_case,
    "rms_norm": rms_norm_case,
    "ffn": ffn_case,
}


def in_mode(
    function: Callable[..., Outputs], inputs: tuple[Tensor, ...], mode: str
) -> Callable[[], object]:
    """`function(*inputs)` as a call without arguments, with gradients as `mode` has them."""
    inputs = tuple(x.detach().requires_grad_(mode != "forward") for x in inputs)
    if mode != "forward+backward":
        return lambda: function(*inputs)
    grad = torch.ones_like(first(function(*inputs)))
    return lambda: torch.autograd.grad(first(function(*inputs)), inputs, grad)


def first(outputs: Outputs) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def until_it_holds(measure: Callable[[int], dict], rounds: int) -> dict:
    """A row that misses its limit is measured again, longer: it may be noise."""
    for attempt in range(1, ATTEMPTS + 1):
        row = measure(rounds * attempt)
        if row["holds"]:
            break
    return row


def default_backend(case: Case, mode: str, factor: float, rounds: int) -> dict:
    """Our call against ATen's."""
    calls = {"ours": case.ours, "ATen": case.bare, **case.aside}
    candidates = [Candidate(n, in_mode(f, case.inputs, mode)) for n, f in calls.items()]
    samples = interleave(candidates, rounds=rounds, batch_seconds=2e-3)
    above = difference(samples["ours"], samples["ATen"]).as_dict(1e6, "_us")
    return {
        "op": case.op,
        "mode": mode,
        "samples": {name: sample.as_dict() for name, sample in samples.items()},
        "above": above,
        "limit_us": DEFAULT_LIMIT_US * factor,
        "holds": above["median_us"] <= DEFAULT_LIMIT_US * factor,
    }


@contextmanager
def launchers_replaced(kernels: ModuleType) -> Iterator[None]:
    """The launchers run once, in the interpreter, and from then on answer with that result."""

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


def kernel_backend(case: Case, mode: str, factor: float, rounds: int) -> dict:
    """The registered op by itself, the launch left out, and our public call of it."""
    with launchers_replaced(case.kernels):
        op = Candidate("op", in_mode(case.registered, case.inputs, mode))
        samples = interleave([op], rounds=rounds, batch_seconds=2e-3)
        with fastattn.use_backend("triton"):
            call = Candidate("public call", in_mode(case.ours, case.inputs, mode))
            samples |= interleave([call], rounds=rounds, batch_seconds=2e-3)
    limit = KERNEL_LIMITS_US[mode] * factor if mode in KERNEL_LIMITS_US else None
    return {
        "op": case.op,
        "mode": mode,
        "samples": {name: sample.as_dict() for name, sample in samples.items()},
        "limit_us": limit,
        "holds": limit is None or samples["op"].median * 1e6 <= limit,
    }


def shown(row: dict) -> list[str]:
    times = [f"{sample['median_us']:.2f}" for sample in row["samples"].values()]
    above = row.get("above")
    if above is not None:
        spread = f"{above['p20_us']:.2f} .. {above['p80_us']:.2f}"
        times = [*times[:2], f"{above['median_us']:+.2f}", spread]
    limit = "" if row["limit_us"] is None else f"{row['limit_us']:.0f}"
    return [f"{row['op']}, {row['mode']}", *times, limit + ("" if row["holds"] else " MISSED")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(CASES), help="one op (default: all)")
    parser.add_argument("--rounds", type=int, default=41, help="values of each (default 41)")
    parser.add_argument(
        "--factor", type=float, default=1.0, help="times the limits, for a slower processor"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = [make() for op, make in CASES.items() if arguments.only in (None, op)]

    tables: dict[str, list[dict]] = {}
    for name, measure in (("default", default_backend), ("kernel", kernel_backend)):
        tables[name] = [
            until_it_holds(
                functools.partial(measure, case, mode, arguments.factor), arguments.rounds
            )
            for case in cases
            for mode in MODES
        ]
    print("The default backend, microseconds a call:")
    headers = ("", "ours", "ATen", "above", "20-80%", "limit")
    print(table(headers, [shown(row) for row in tables["default"]]))
    for row in tables["default"]:
        for name, sample in list(row["samples"].items())[2:]:
            print(f"({name}, {row['mode']}: {sample['median_us']:.2f})")
    print("\nA kernel backend without its launches, microseconds a call:")
    headers = ("", "registered op", "public call", "limit of the op")
    print(table(headers, [shown(row) for row in tables["kernel"]]))
    if arguments.json:
        write_json(
            arguments.json, {"script": "overhead", "environment": environment("cpu"), **tables}
        )
    return 0 if all(row["holds"] for rows in tables.values() for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
