"""The `gluon` backend: the rule on its tiles, hostile tensors, random problems, who is chosen."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops import laws
from ops.ffn.cases import ACTIVATIONS, Case, check, output_and_gradients

import fastattn
from fastattn.backends import explanation_of
from fastattn.ops.common import gluon, gluon_products, launch
from fastattn.ops.ffn import proof
from oracle import assert_close_to_reference

HALF, BF16 = torch.float16, torch.bfloat16
LAYOUTS = ("linear", "conv1d")
Seed = Callable[[int], None]

# A tile is 192 tokens by 256 hidden features, 128 with a gate; a trip has 64 terms of the sums.
CASES = {
    "one token, one box of terms": Case((8,), 8, 8, HALF),
    "a tile, whole": Case((192, 64), 256, 16, HALF),
    "one row beyond a tile": Case((193, 72), 264, 16, HALF),
    "more terms than stages": Case((70, 64 * 5 + 8), 136, 24, HALF),
    "more tiles than programs": Case((400, 40), 520, 8, HALF),
    "two groups of rows of tiles": Case((192 * 9 + 5, 16), 264, 8, HALF),
    "no b1": Case((2, 3, 24), 48, 16, HALF, bias1=False),
    "gated, a tile, whole": Case((192, 64), 128, 16, HALF, gated=True),
    "gated, several tiles, odd": Case((200, 72), 264, 16, HALF, gated=True),
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
    check(dataclasses.replace(CASES[name], layout=layout, device=device), "gluon")


@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(
    activation: str, gated: bool, dtype: torch.dtype, gluon_seed: Seed, device: str
) -> None:
    case = Case((66, 40), 56, 24, dtype, activation, gated=gated, device=device)
    forward(case)
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
        out_features=8 * rng.randint(1, 50),
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
        case = drawn(seed, device)
        forward(case)
        check(dataclasses.replace(case, recompute=seed % 2 == 0), "gluon")


def test_the_schedule_changes_no_bit(gluon_seed: Seed, device: str) -> None:
    case = Case((200, 72), 264, 16, HALF, gated=True, device=device)
    cotangent = torch.randn(200, 16, device=device).half()
    results = []
    for seed in range(4):
        gluon_seed(seed)
        results.append(output_and_gradients(case.ours("gluon"), case.inputs(), cotangent))
    for name, first in results[0].items():
        assert all(torch.equal(result[name], first) for result in results), name


# --- strides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, gluon_seed: Seed, device: str) -> None:
    case = Case((7, 24), 40, 16, HALF, layout=layout, gated=True, device=device)
    inputs = case.inputs()
    expected = forward(case, inputs)
    for name in ("x", "w1", "gate", "w2"):
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
            explanation = explanation_of(
                fastattn.ffn, **{"b1": None, "b2": None, **inputs, name: view},
                layout=layout, backend="gluon",
            )  # fmt: skip
            laws.copies_are_told(explanation, case.ours("gluon"), **inputs | {name: view})
        repeated = matrix[:1].expand(rows, cols)
        assert repeated.stride(0) == 0
        forward(case, inputs | {name: repeated})
    for name in ("b1", "gate_bias", "b2"):
        view = torch.stack([inputs[name], inputs[name]], 1)[:, 1]
        assert torch.equal(case.ours("gluon")(**inputs | {name: view}), expected)


# --- what is launched ---------------------------------------------------------------------------

PRODUCT, UP, DERIVATIVE = "product_kernel", "ffn_forward", "ffn_backward"


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("b2",), []),
        (("x",), [DERIVATIVE, PRODUCT]),
        (("w1",), [DERIVATIVE, PRODUCT]),
        (("gate",), [DERIVATIVE, PRODUCT]),
        (("w2",), [DERIVATIVE, PRODUCT]),
        (("b1",), [DERIVATIVE]),
        (("gate_bias", "x"), [DERIVATIVE, PRODUCT]),
        (("x", "w1", "gate", "w2"), [DERIVATIVE, *[PRODUCT] * 4]),
    ],
)
def test_what_is_frozen_costs_nothing(
    wanted: tuple[str, ...],
    expected: list[str],
    recompute: bool,
    gluon_seed: Seed,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    """The kernels of a call: none is another backend's."""
    launched: list[str] = []
    run = gluon.launch

    def spy(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        run(kernel, *args, **constants)

    monkeypatch.setattr(gluon, "launch", spy)
    case = Case((9, 24), 40, 16, HALF, gated=True, recompute=recompute, device=device)
    leaves = {n: x.requires_grad_(n in wanted) for n, x in case.inputs().items()}
    out = case.ours("gluon")(**leaves)
    assert launched == [UP, PRODUCT]
    torch.autograd.grad(out.sum(), [leaves[n] for n in wanted])
    again = [UP] if recompute and expected else []
    assert launched[2:] == [*again, *expected]


def test_clusters_where_both_programs_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the last round costs less than they gain; a proof runs both kinds of kernels."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(gluon, "CLUSTERS", True)
    found = {
        shape: gluon_products.programs(*shape, torch.device("cpu"))
        for shape in ((192, 4096), (193, 4096), (4096, 4096), (3 * 192, 44 * 256), (577, 11264))
    }
    assert list(found.values()) == [1, 2, 2, 1, 2]
    assert gluon_products.programs(proof.TOKENS, proof.HIDDEN, torch.device("cpu")) == 2
    assert gluon_products.programs(proof.FEW_TOKENS, proof.HIDDEN, torch.device("cpu")) == 1
    assert gluon_products.grid(11, 16, torch.device("cpu"), 2) == (66,)
    monkeypatch.setattr(gluon, "CLUSTERS", False)
    assert gluon_products.programs(4096, 4096, torch.device("cpu")) == 1


@pytest.mark.parametrize("rows", (192, 193, 380, 577, 800))  # of tiles of 192: 1, 2, 2, 4, 5
def test_rows_of_tiles_in_pairs(rows: int, gluon_seed: Seed, device: str) -> None:
    left, right = torch.randn(rows, 72, device=device), torch.randn(72, 264, device=device)
    out = torch.empty(rows, 264, dtype=HALF, device=device)
    gluon_products.product(out, left.half(), right.half())
    exact = left.half().double() @ right.half().double()
    assert_close_to_reference(out, exact.half(), exact, name="out")


@pytest.mark.parametrize("more", (False, True))
@pytest.mark.parametrize("biased", (False, True))
def test_a_product(more: bool, biased: bool, gluon_seed: Seed, device: str) -> None:
    """Both operands in either order, and terms that are added: one rounding at the end."""
    left, right = torch.randn(70, 72, device=device), torch.randn(72, 136, device=device)
    bias = torch.randn(136, device=device).half() if biased else None
    added = (left[:, :40].half(), right[:40].half()) if more else None
    for x, y in ((left, right), (left.t().contiguous().t(), right.t().contiguous().t())):
        x, y = x.half(), y.half()
        out = torch.empty(70, 136, dtype=HALF, device=device)
        gluon_products.product(out, x, y, bias, added)
        exact = x.double() @ y.double()
        if added is not None:
            exact += added[0].double() @ added[1].double()
        if bias is not None:
            exact += bias.double()
        assert_close_to_reference(out, exact.half(), exact, name="out")


# --- who is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": (3, 20)}, "in steps of 8, and they are 20, 32 and 8"),
        ({"hidden": 36}, "in steps of 8, and they are 16, 36 and 8"),
        ({"out_features": 9}, "in steps of 8, and they are 16, 32 and 9"),
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
