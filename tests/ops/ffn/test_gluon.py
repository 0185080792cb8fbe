"""The `gluon` backend: the rule on its tiles, hostile tensors, random problems, who is chosen."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.ffn.cases import ACTIVATIONS, Case, check

import fastattn
from fastattn.backends import explanation_of, triton_runs
from fastattn.ops.ffn import gluon
from oracle import assert_close_to_reference

HALF, BF16 = torch.float16, torch.bfloat16
LAYOUTS = ("linear", "conv1d")
Seed = Callable[[int], None]

# A tile is 192 tokens by 256 hidden features, 128 with a gate; a trip has 64 terms of the sums.
CASES = {
    "one token, one box of terms": Case((8,), 8, 5, HALF),
    "a tile, whole": Case((192, 64), 256, 16, HALF),
    "one row beyond a tile": Case((193, 72), 264, 9, HALF),
    "more terms than stages": Case((70, 64 * 5 + 8), 136, 24, HALF),
    "more tiles than programs": Case((400, 40), 520, 8, HALF),
    "two groups of rows of tiles": Case((192 * 9 + 5, 16), 264, 8, HALF),
    "no b1": Case((2, 3, 24), 48, 16, HALF, bias1=False),
    "gated, a tile, whole": Case((192, 64), 128, 16, HALF, gated=True),
    "gated, several tiles, odd": Case((200, 72), 264, 9, HALF, gated=True),
    "gated, no b1": Case((7, 24), 48, 16, HALF, bias1=False, gated=True),
    "gated, no gate_bias": Case((7, 24), 48, 16, HALF, gated=True, gate_bias=False),
}


def forward(case: Case, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Only the forward under the rule, as it is without gradients and with them."""
    inputs = case.inputs() if inputs is None else inputs
    ours = case.ours("gluon")(**inputs)
    exact = case.eager(**{name: x.double() for name, x in inputs.items()})
    assert_close_to_reference(ours, case.eager(**inputs), exact, name=str(case))
    saving = case.ours("gluon")(**{n: x.detach().requires_grad_() for n, x in inputs.items()})
    assert torch.equal(saving, ours)
    return ours


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, layout: str, gluon_seed: Seed, device: str) -> None:
    """With all gradients, for which the Triton kernels read the `pre` that this one stored."""
    check(dataclasses.replace(CASES[name], layout=layout, device=device), "gluon")


@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(
    activation: str, gated: bool, dtype: torch.dtype, gluon_seed: Seed, device: str
) -> None:
    case = Case((66, 40), 56, 24, dtype, activation, gated=gated, device=device)
    forward(case)
    if dtype == HALF or triton_runs() != "interpreted":
        check(dataclasses.replace(case, recompute=True), "gluon")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_and_those_that_are_not_finite(
    activation: str, gluon_seed: Seed, device: str
) -> None:
    """Each token's row is its own: the others have what they have without it."""
    case = Case((200, 24), 64, 64, HALF, activation, bias2=False, device=device)
    inputs = case.inputs() | {"w2": torch.eye(64, dtype=HALF, device=device)}
    inputs["x"][3] *= 300
    expected = forward(case, inputs)
    for value in (float("nan"), float("inf")):
        x = inputs["x"].clone()
        x[65, 5] = value
        out = case.ours("gluon")(**inputs | {"x": x})
        assert not out[65].isfinite().any() or value > 0
        out[65] = expected[65]
        assert torch.equal(out, expected)


def drawn(seed: int, device: str) -> Case:
    rng = random.Random(seed)
    leading = [rng.randint(1, 9) for _ in range(rng.randint(0, 3))]
    return Case(
        shape=(*leading, 8 * rng.randint(1, 30)),
        hidden=8 * rng.randint(1, 50),
        out_features=rng.randint(1, 50),
        dtype=rng.choice((HALF, BF16)),
        activation=rng.choice(list(ACTIVATIONS)),
        layout=rng.choice(LAYOUTS),
        bias1=rng.random() < 0.7,
        bias2=rng.random() < 0.7,
        gated=rng.random() < 0.5,
        gate_bias=rng.random() < 0.7,
        device=device,
        seed=seed,
    )


@pytest.mark.parametrize(
    "first", (0, *(pytest.param(n, marks=pytest.mark.long) for n in range(10, 500, 10)))
)
def test_random_problems(first: int, gluon_seed: Seed, device: str) -> None:
    for seed in range(first, first + 10):
        gluon_seed(seed)
        forward(drawn(seed, device))


def test_the_schedule_changes_no_bit(gluon_seed: Seed, device: str) -> None:
    case = Case((200, 200), 264, 16, HALF, gated=True, device=device)
    outs = []
    for seed in range(4):
        gluon_seed(seed)
        outs.append(case.ours("gluon")(**case.inputs()))
    assert all(torch.equal(out, outs[0]) for out in outs)


# --- strides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, gluon_seed: Seed, device: str) -> None:
    case = Case((7, 24), 40, 16, HALF, layout=layout, gated=True, device=device)
    inputs = case.inputs()
    expected = forward(case, inputs)
    for name in ("x", "w1", "gate"):
        matrix = inputs[name]
        rows, cols = matrix.shape
        for view in (
            matrix.t().contiguous().t(),
            torch.cat([matrix, matrix], 1)[:, cols:],  # a half of a joint matrix
            torch.cat([matrix[:, :1], matrix], 1)[:, 1:],  # not aligned
            torch.stack([matrix, matrix], 2)[..., 0],  # no stride is 1
        ):
            assert torch.equal(view, matrix)
            assert torch.equal(case.ours("gluon")(**inputs | {name: view}), expected)
        repeated = matrix[:1].expand(rows, cols)
        assert repeated.stride(0) == 0
        forward(case, inputs | {name: repeated})
    for name in ("b1", "gate_bias"):
        view = torch.stack([inputs[name], inputs[name]], 1)[:, 1]
        assert torch.equal(case.ours("gluon")(**inputs | {name: view}), expected)


# --- who is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": (3, 20)}, "in steps of 8, and they are 20 and 32"),
        ({"hidden": 36}, "in steps of 8, and they are 16 and 36"),
        ({"shape": (0, 16)}, "no descriptor of an empty tensor"),
        ({"dtype": torch.float32}, "float16 and bfloat16, not in torch.float32"),
        ({"dtype": torch.float64}, "float16 and bfloat16, not in torch.float64"),
    ],
)
def test_what_the_kernel_declines(change: dict[str, Any], reason: str, gluon_seed: Seed) -> None:
    case = dataclasses.replace(Case((3, 16), 32, 8, HALF), **change)
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        case.ours("gluon")(**case.inputs())
    case.ours(None)(**case.inputs())


def test_it_is_chosen_only_by_name(gluon_seed: Seed, device: str) -> None:
    given = Case((9, 16), 24, 8, HALF, device=device).inputs()
    explanation = explanation_of(fastattn.ffn, **given)
    assert explanation.backend != "gluon"
    assert "gluon" in str(explanation.reasons["gluon"])
    assert explanation_of(fastattn.ffn, **given, backend="gluon").backend == "gluon"


def test_a_cpu_without_the_emulator_is_refused() -> None:
    case = Case((11, 16), 24, 8, HALF)  # of no other test, whose plan is kept
    with pytest.raises(fastattn.UnsupportedError, match="run on Hopper GPUs, not on a CPU"):
        case.ours("gluon")(**case.inputs())


def test_the_backward_is_another_backends() -> None:
    assert "no backward" in gluon.backward_unsupported(None)  # type: ignore[arg-type]
