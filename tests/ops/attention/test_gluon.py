"""The `gluon` backend: random problems, hostile tensors, and who is chosen."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from ops.attention.cases import Case, check_forward

import fastattn
import fastattn.ops.attention.cuda
import fastattn.ops.attention.gluon
from fastattn.backends import explanation_of, problem_of
from fastattn.ops.attention.gluon import tiles
from fastattn.ops.common import gluon
from oracle import assert_close_to_reference

LAYOUTS = ("contiguous", "heads first", "expanded")  # of which descriptors can be made

CHUNK = 12  # draws of one test

Seed = Callable[[int], None]


def drawn(seed: int, device: str) -> Case:
    """A case of any shape and features that the kernels have, small enough for the emulator."""
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 1, 2))
    head_dim = 8 * rng.randint(1, 32 if rng.random() < 0.2 else 16)
    edge = rng.choice((0, 0, 1, -1))
    packed = rng.random() < 0.3
    sequences = [(rng.randint(0, 200), rng.randint(0, 300)) for _ in range(rng.randint(1, 3))]
    return Case(
        packed=(*sequences, (rng.randint(1, 9), rng.randint(1, 9))) if packed else None,
        used=packed and rng.random() < 0.3,
        tail=packed * rng.randint(0, 150),
        lengths=not packed and rng.random() < 0.3,
        seqlen_q=max(1, rng.choice((1, 64, 128, rng.randint(1, 300))) + edge),
        seqlen_k=max(1, rng.choice((1, 64, 128, 256, rng.randint(1, 500))) + edge),
        batch=rng.choice((1, 1, 2)),
        heads=kv_heads * rng.choice((1, 2, 3)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_v=rng.choice((None, None, 8 * rng.randint(1, 16))),
        causal=rng.choice((False, True, "top_left")),
        window=rng.choice((None, None, (rng.randint(-1, 200), rng.randint(-1, 200)))),
        softmax_scale=rng.choice((None, None, None, -0.2, 0.0, 0.5)),
        softcap=rng.choice((0.0, 0.0, 2.0, 20.0, 64.0)),
        alibi=rng.choice((None, None, "heads", "batch")),
        sink=rng.random() < 0.25,
        layout=rng.choice(LAYOUTS),
        dtype=rng.choice((torch.float16, torch.bfloat16)),
        device=device,
        seed=seed,
    )


@pytest.mark.fuzz
def test_random_problems(
    first: int, count: int, gluon_seed: Seed, device: str, pytestconfig: pytest.Config
) -> None:
    for seed in range(first, first + count):
        for schedule in range(pytestconfig.getoption("schedules")):
            gluon_seed(seed + schedule)
            check_forward(drawn(seed, device), "gluon")


def tensors(device: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(1, n, 2, 64, dtype=torch.float16, device=device)
        for name, n in (("q", 70), ("k", 150), ("v", 150))
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, gluon_seed: Seed, device: str) -> None:
    check_forward(
        Case(70, 150, layout=layout, head_dim=64, dtype=torch.float16, device=device), "gluon"
    )


@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_tensors_that_no_descriptor_takes_are_refused(
    name: str, gluon_seed: Seed, device: str
) -> None:
    """One element past an aligned address, and rows that are no multiple of 16 bytes apart."""
    given = tensors(device)
    x = given[name]
    shifted = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    for odd, told in (
        (shifted, rf"{name} begins 2 bytes after one: give {name}.clone\(\)"),
        (torch.cat([x, x[..., :2]], -1)[..., :64], rf"132, 66, 1\): give {name}.contiguous\(\)"),
        (torch.stack([x, x], -1)[..., 0], rf"128, 2\): give {name}.contiguous\(\)"),
    ):
        assert not gluon.reads(odd)
        call = {**given, name: odd}
        assert re.search(told, str(explanation_of(fastattn.attention, **call).reasons["gluon"]))
        for _ in range(2):  # a plan is kept after the first call, if any
            with pytest.raises(fastattn.UnsupportedError, match=told):
                fastattn.attention(**call, backend="gluon")
            fastattn.attention(**given, backend="gluon")


def test_dimensions_of_size_1_may_have_any_stride(gluon_seed: Seed, device: str) -> None:
    q = torch.randn(1, 40, 1, 64, dtype=torch.float16, device=device)
    odd = q.as_strided(q.shape, (3, 64, 7, 1))
    assert gluon.reads(odd)
    outs = [fastattn.attention(x, x, x, backend="gluon") for x in (q, odd)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("softcap", (0.0, 20.0))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_a_row_that_is_not_finite_stays_alone(
    value: float, softcap: float, gluon_seed: Seed, device: str
) -> None:
    """It is NaN where the definition is: a softcap makes infinite scores finite."""
    given = tensors(device) | {"softcap": softcap}
    expected = fastattn.attention(**given, backend="gluon")
    given["q"][0, 13, 1, 5] = value
    out = fastattn.attention(**given, backend="gluon")
    row = fastattn.attention(**given, backend="reference")[0, 13, 1]
    assert row.isnan().all() == (not softcap or value != value)
    torch.testing.assert_close(out[0, 13, 1], row, equal_nan=True)
    out[0, 13, 1] = expected[0, 13, 1]
    assert torch.equal(out, expected)


def test_large_scores(gluon_seed: Seed, device: str) -> None:
    """Far beyond what 2^x holds, in both directions."""
    given = tensors(device)
    for sign in (1, -1):
        q = sign * 200 * given["q"].abs()
        out = fastattn.attention(q, given["k"].abs(), given["v"], backend="gluon")
        exact = [x.double() for x in (q, given["k"].abs(), given["v"])]
        eager = fastattn.attention(q, given["k"].abs(), given["v"], backend="reference")
        assert_close_to_reference(
            out, eager, fastattn.attention(*exact, backend="reference"), ulps=4
        )


def test_the_schedule_changes_no_bit(gluon_seed: Seed, device: str) -> None:
    given = tensors(device)
    outs = []
    for seed in range(4):
        gluon_seed(seed)
        outs.append(fastattn.attention(**given, causal=True, backend="gluon"))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_it_is_chosen_only_by_name(gluon_seed: Seed, device: str) -> None:
    given = tensors(device)
    explanation = explanation_of(fastattn.attention, **given)
    assert explanation.backend != "gluon"
    assert "name backend='gluon' to use it" in str(explanation.reasons["gluon"])
    assert explanation_of(fastattn.attention, **given, backend="gluon").backend == "gluon"


@pytest.mark.parametrize("kernels", [fastattn.ops.attention.gluon, fastattn.ops.attention.cuda])
def test_few_queries_are_left_to_the_kernel_that_splits_their_keys(kernels: ModuleType) -> None:
    k = torch.empty(2, 4096, 2, 64, dtype=torch.float16)
    for queries, few in ((1, True), (4, True), (5, False)):  # of 4 heads a key head: 16 rows
        q = torch.empty(2, queries, 8, 64, dtype=torch.float16)
        reason = kernels.declined(problem_of(fastattn.attention, q, k, k)[0])
        assert (reason is not None and "splits the keys" in reason) == few


def test_a_cpu_without_the_emulator_is_refused() -> None:
    q = torch.randn(1, 9, 1, 64, dtype=torch.float16)  # of no other test, whose plan is kept
    with pytest.raises(fastattn.UnsupportedError, match="run on Hopper GPUs, not on a CPU"):
        fastattn.attention(q, q, q, backend="gluon")


def test_every_width_has_a_tile_that_fits() -> None:
    widths = range(8, 257, 8)
    for head_dim, head_dim_v in itertools.product(widths, widths):
        for crowded in (False, True):
            tile = tiles.forward(head_dim, head_dim_v, crowded)
            assert tile.d >= tile.width >= head_dim and tile.dv >= head_dim_v
            assert 128 * (tile.consumers * tile.registers + 24) <= 65536
            of_q = tile.consumers * tile.rows * (tile.d + (tile.dv if tile.dv != tile.d else 0))
            shared = 2 * (of_q + tile.stages * tile.keys * (tile.d + tile.dv))
            assert shared + 1024 <= 227 * 1024


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 0, 2, 64), {}, "no descriptor of an empty tensor"),
        ((1, 5, 2, 64), {"softcap": 300.0}, "a softcap above 64.0 would lose digits"),
        ((1, 5, 2, 64), {"dropout_p": 0.5}, "no dropout"),
        ((1, 5, 2, 60), {}, "head_dim in steps of 8"),
        ((1, 2**29 + 1, 1, 64), {}, "a sequence of 536870913 tokens is above 2\\^29"),
    ],
)
def test_declines_with_the_reason(
    shape: tuple[int, ...], options: dict[str, float], reason: str, gluon_seed: Seed, device: str
) -> None:
    q = torch.empty(1, dtype=torch.float16, device=device).expand(shape)
    explanation = explanation_of(fastattn.attention, q, q, q, **options, backend=None)
    assert re.search(reason, str(explanation.reasons["gluon"]))
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        fastattn.attention(q, q, q, **options, backend="gluon")
