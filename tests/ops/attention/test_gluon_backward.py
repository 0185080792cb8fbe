"""Attention's backward in Gluon: equal bits at any schedule, or any order, and what it leaves out.

test_attention.py holds it to float64, as every backend; tests/gluon plants bugs in it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from gluon.launching import launch
from gluon.package import ordered
from ops.attention.cases import Case, call, check, poisoned
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import fastattn
from fastattn import backends
from fastattn.ops.attention import gluon as room
from fastattn.ops.attention import problem as problems
from fastattn.ops.attention.call import NO_GRADIENT
from fastattn.ops.attention.gluon import rows
from fastattn.ops.attention.problem import describe
from fastattn.ops.attention.registration import BACKENDS
from fastattn.ops.common import gluon as kernels
from oracle import assert_close_to_reference

pytestmark = pytest.mark.skipif(
    not kernels.REDUCES, reason="TMA reductions, with which dQ is added, come with Triton 3.8"
)

# Three key tiles and three of queries; two heads share a key head.
CASES = {
    "full": Case(150, 300, batch=1, heads=2, kv_heads=1, head_dim=64),
    "nine heads": Case(70, 300, batch=3, heads=3, kv_heads=3, head_dim=64),  # eight start in turn
    "causal": Case(190, 300, batch=1, heads=2, kv_heads=1, head_dim=64, causal=True),
    "window": Case(190, 300, batch=1, heads=2, kv_heads=1, head_dim=64, window=(70, 20)),
    "lengths": Case(70, 300, batch=2, lengths=True, kv_heads=1, head_dim=64, softcap=5.0, seed=1),
    "packed": Case(
        packed=((70, 140), (30, 50), (0, 20), (65, 20)),
        tail=9,
        kv_heads=1,
        head_dim=64,
        window=(60, 0),
        alibi="batch",
    ),
}


@pytest.fixture
def schedule() -> Iterator[dict[str, Any]]:
    """Options of the emulator; additions to dQ that nothing orders are an error in it."""
    options: dict[str, Any] = {}

    def launcher(kernel: Any, *args: Any, **constants: Any) -> Any:
        bases = [x.base for x in args if isinstance(x, TensorDescriptor)]
        assert all(x.data_ptr() % kernels.ALIGNMENT == 0 for x in bases)
        return launch(kernel, *args, ordered=ordered(kernel, args[1:]), **options, **constants)

    kernels.use(launcher)
    yield options
    kernels.use(None)


def gradients(case: Case, beyond: float = torch.nan) -> tuple[torch.Tensor, ...]:
    """(dq in float32, dq, dk, dv) of a case, and of an LSE made up: the backward runs by itself.

    The first is of the additions: rounded to 16 bits, those of two orders are mostly equal.

    Args:
        beyond: what lies there of the inputs and dO that is no sequence's.
    """
    case = dataclasses.replace(case, dtype=torch.bfloat16)
    problem = case.draw()
    out, lse = call(case, problem, "reference", problem.tensors, return_lse=True)
    inputs = poisoned(case, problem)
    dout = problem.dout.clone()
    if problem.packing:
        of_none = torch.ones(len(dout), dtype=torch.bool)
        for place in problem.places("q"):
            of_none[place] = False
        dout[of_none] = beyond
    tensors = [torch.where(inputs[x].isfinite(), inputs[x], beyond) for x in "qkv"]
    if case.packed is None:
        settings, extras = problems.check(*tensors, **problem.options)
    else:
        settings, extras = problems.check_varlen(*tensors, **problem.packing, **problem.options)
    with mock.patch.object(rows, "after", wraps=rows.after) as after:
        found = room.backward(dout, problem.dlse, out, lse, NO_GRADIENT, *tensors, extras, settings)
    return after.call_args.args[0], *found[:3]


@pytest.mark.parametrize("name", CASES)
def test_equal_bits_at_any_schedule(name: str, schedule: dict[str, Any]) -> None:
    """Programs in any order, or as a GPU starts them; one at once, or all."""
    schedule.update(seed=0, resident=1, in_order=True)
    expected = gradients(CASES[name])
    assert all(x.any() and x.isfinite().all() for x in expected)
    for seed in range(1, 7):
        schedule.update(seed=seed, resident=seed, in_order=seed % 2 == 0)
        assert all(map(torch.equal, gradients(CASES[name]), expected))


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("name", CASES)
def test_any_order_is_right(name: str, schedule: dict[str, Any]) -> None:
    """And of three key tiles another one at another schedule: the test above sees a lost order."""
    case = dataclasses.replace(CASES[name], deterministic=False, dtype=torch.float16)
    found = []
    for seed in range(4):
        schedule.update(seed=seed, resident=1 + seed, in_order=seed % 2 == 0)
        check(case, "gluon")
        found.append(gradients(case))
    sums, _, *others = zip(*found)
    assert all(torch.equal(x, of_one[0]) for of_one in others for x in of_one)
    if name in ("full", "causal"):
        assert not all(torch.equal(x, sums[0]) for x in sums)


@pytest.mark.usefixtures("any_order")
def test_the_mode_of_torch_keeps_the_order(schedule: dict[str, Any]) -> None:
    """Of a call whose plan without an order is kept, of a packed one, and of one that is compiled."""
    given: list[bool] = []
    launcher = kernels._launcher

    def noted(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        if "semaphores" in kernel.arg_names:
            given.append(dict(zip(kernel.arg_names, args))["semaphores"] is not None)
        launcher(kernel, grid, *args, **constants)

    kernels.use(noted)
    q = torch.randn(70, 1, 64, dtype=torch.float16, requires_grad=True)
    starts = torch.tensor([0, 70], dtype=torch.int32)

    def attend(**more: Any) -> torch.Tensor:
        return fastattn.attention(q[None], q[None], q[None], backend="gluon", **more)

    def packed(**more: Any) -> torch.Tensor:
        return fastattn.attention_varlen(q, q, q, starts, starts, 70, 70, backend="gluon", **more)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    calls = (attend, packed, compiled)
    for run in calls:
        run().sum().backward()
        run(deterministic=False).sum().backward()
    assert given == [True, False] * 3
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for run in calls:
            run(deterministic=False).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert given[6:] == [True] * 3


@pytest.mark.parametrize("name", ("lengths", "packed"))
def test_what_lies_beyond_a_sequence_changes_no_bit(name: str, schedule: dict[str, Any]) -> None:
    assert all(map(torch.equal, gradients(CASES[name]), gradients(CASES[name], beyond=0.0)))


@pytest.mark.parametrize(
    ("features", "width", "reason"),
    [
        ({}, 64, None),
        ({"causal": True, "sink": torch.zeros(2).half()}, 128, None),
        ({"window": (3, 4)}, 24, None),
        ({"softcap": 2.0, "alibi_slopes": torch.ones(2)}, 64, None),
        ({"key_lengths": torch.tensor([5])}, 64, None),
        ({}, 136, "head_dim up to 128, not 136"),
    ],
)
def test_who_runs_the_backward(
    features: dict[str, Any], width: int, reason: str | None, schedule: dict[str, Any]
) -> None:
    """These kernels, or the next ones, even if the user named the forward's backend."""
    q = torch.zeros(1, 8, 2, width, dtype=torch.float16)
    problem = describe(q, q, q, **features)
    said = room.backward_unsupported(problem)
    assert said is None if reason is None else reason in str(said)
    module = backends.select_backward("attention", BACKENDS, problem, "gluon", forced=True)
    assert (module is room) == (reason is None)


def test_a_gradient_that_no_descriptor_takes_is_copied(schedule: dict[str, Any]) -> None:
    """One element past an aligned address: autograd's, for which the user has no choice."""
    problem = dataclasses.replace(CASES["causal"], dtype=torch.float16).draw()
    inputs = [problem.tensors[name] for name in "qkv"]
    odd = problem.dout.new_empty(problem.dout.numel() + 1)[1:].view(problem.dout.shape)
    odd.copy_(problem.dout)
    assert not kernels.reads(odd)
    results = []
    for dout in (problem.dout, odd):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = fastattn.attention(*leaves, causal=True, backend="gluon")
        results.append(torch.autograd.grad(out, leaves, dout))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("sign", (1, -1))
def test_large_scores(sign: int, schedule: dict[str, Any]) -> None:
    """Weights of keys past the end, or of those that a row does not see, would be infinite."""
    problem = dataclasses.replace(CASES["causal"], dtype=torch.bfloat16).draw()
    q, k, v = (problem.tensors[name] for name in "qkv")
    inputs = [8 * sign * q.abs(), 8 * k.abs(), v]

    def gradients_of(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = fastattn.attention(*leaves, causal=True, backend=backend)
        return torch.autograd.grad(out, leaves, problem.dout.to(dtype))

    ours = gradients_of("gluon", torch.bfloat16)
    eager = gradients_of("reference", torch.bfloat16)
    exact = gradients_of("reference", torch.float64)
    terms = max(x.abs().max().item() for x in exact)
    for triple in zip(ours, eager, exact):
        assert_close_to_reference(*triple, ulps=4, terms=terms)


def drawn(seed: int) -> Case:
    """A case of any shape and features that the kernels have, small enough for the emulator."""
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2))
    sides = draw.randint(-1, 200), draw.randint(-1, 200)
    bands = ({}, {"causal": True}, {"causal": "top_left"}, {"window": sides})
    band: dict[str, Any] = draw.choice(bands)
    packed = draw.random() < 0.4
    sequences = [(draw.randint(0, 200), draw.randint(0, 300)) for _ in range(draw.randint(1, 3))]
    return Case(
        draw.randint(1, 300), draw.randint(1, 400), batch=draw.choice((1, 2)),
        packed=(*sequences, (draw.randint(1, 99), draw.randint(1, 199))) if packed else None,
        used=packed and draw.random() < 0.4, tail=packed * draw.choice((0, 1, 100)),
        lengths=not packed and draw.random() < 0.4,
        heads=kv_heads * draw.choice((1, 2, 3)), kv_heads=kv_heads, head_dim=8 * draw.randint(1, 16),
        head_dim_v=draw.choice((None, 8 * draw.randint(1, 16))), sink=draw.random() < 0.2,
        softcap=draw.choice((0.0, 0.0, 0.0, 5.0, 30.0)),
        alibi=draw.choice((None, None, None, "heads", "batch")),
        softmax_scale=draw.choice((None, None, -0.2, 0.0)), dtype=draw.choice((torch.float16, torch.bfloat16)),
        layout=draw.choice(("contiguous", "heads first", "expanded")), seed=seed, **band,
    )  # fmt: skip


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 5))]
)
def test_random_shapes(part: int, schedule: dict[str, Any]) -> None:
    count = 8 if part == 0 else 40
    for seed in range(40 * part, 40 * part + count):
        schedule.update(seed=seed, resident=1 + seed % 4, in_order=seed % 3 == 0)
        check(drawn(seed), "gluon")
