"""linear against float64 on every backend; then its boundary and what it owes beyond the numbers."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from ops import laws
from ops.linear.cases import BACKENDS, EAGER, Case, check, output_and_gradients

import fastattn
from fastattn.backends import explanation_of, triton_runs
from fastattn.ops.common import launch
from fastattn.ops.common.activations import ACTIVATIONS
from fastattn.ops.linear import interface, linear

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Each case has its reason.
CASES = {
    "one token": Case((16,), 32),
    "few tokens, odd": Case((3, 11), 37),
    "one feature": Case((9, 1), 1, activation="silu"),
    "three axes": Case((2, 3, 32), 48, activation="relu"),
    "several tiles, odd": Case((70, 33), 135, activation="gelu"),
    "no bias": Case((70, 24), 40, HALF, bias=False),
    "no activation": Case((5, 24), 40, activation=None),
    "float16": Case((6, 100), 60, HALF, "gelu"),
}
# The tiles of ops/common/tiles.py, for the interpreter's 4 "multiprocessors".
TILES = {
    "medium tile": Case((66, 32), 48),
    "large tile, masked": Case((300, 80), 528, HALF),
    "two groups of rows of tiles": Case((1100, 17), 70, HALF, "silu"),
    "three parts of column sums": Case((8400, 3), 2, HALF, "relu"),
}


def runs(case: Case, backend: str) -> bool:
    """A product without an activation is ATen's."""
    return backend != "triton" or case.activation is not None


@pytest.mark.parametrize(
    ("name", "backend"), [(n, b) for n, case in CASES.items() for b in BACKENDS if runs(case, b)]
)
def test_against_float64(name: str, backend: str, device: str) -> None:
    check(dataclasses.replace(CASES[name], device=device), backend)


@pytest.mark.parametrize("name", TILES)
def test_tiles(name: str, device: str) -> None:
    check(dataclasses.replace(TILES[name], device=device), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (HALF, BF16, DOUBLE))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, backend: str, device: str) -> None:
    if backend == "triton" and (dtype == DOUBLE or (dtype, triton_runs()) == (BF16, "interpreted")):
        pytest.skip("refused: test_what_kernels_refuse")
    check(Case((66, 40), 50, dtype, activation, device=device), backend)


@pytest.mark.fuzz
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend: str, pytestconfig: pytest.Config, device: str) -> None:
    draws, first = (pytestconfig.getoption(name) for name in ("--draws", "--seed"))
    for seed in range(first, first + draws // 6):
        drawn(seed, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_random_problems(seed: int, backend: str, device: str) -> None:
    drawn(seed, backend, device)


def drawn(seed: int, backend: str, device: str) -> None:
    """A random problem, its tensors lying in random ways."""
    r = random.Random(seed)
    halves = (HALF,) if (backend, triton_runs()) == ("triton", "interpreted") else (HALF, BF16)
    case = Case(
        shape=(*(r.randint(1, 9) for _ in range(r.randint(0, 3))), r.randint(1, 150)),
        out_features=r.choice((r.randint(1, 300), 16 * r.randint(1, 20))),
        dtype=r.choice((*halves, FLOAT)),
        activation=r.choice((*ACTIVATIONS, *(() if backend == "triton" else (None,)))),
        bias=r.random() < 0.7,
        device=device,
        seed=seed,
    )
    inputs = case.inputs()
    if r.random() < 0.4:
        inputs["x"] = inputs["x"].repeat_interleave(2, -1)[..., ::2]
    if r.random() < 0.4:
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    check(case, backend, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str, device: str) -> None:
    case = Case((4, 6, 24), 40, device=device)
    inputs = case.inputs()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    for name, view in (
        ("x", normal(4, 6, 3, 24)[:, :, 1]),  # rows evenly spaced
        ("x", normal(6, 4, 24).transpose(0, 1)),  # and not
        ("x", normal(24).expand(4, 6, 24)),
        ("x", normal(4, 6, 1).expand(4, 6, 24)),
        ("weight", normal(24, 40).t()),
        ("weight", normal(40, 48)[:, ::2]),
        ("weight", normal(1, 24).expand(40, 24)),
        ("bias", normal(80)[::2]),
        ("bias", normal(1).expand(40)),
    ):
        check(case, backend, inputs | {name: view})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "out_features"), [((0, 8), 16), ((2, 0, 8), 16), ((3, 0), 16), ((3, 8), 0), ((0,), 4)]
)
def test_empty(shape: tuple[int, ...], out_features: int, backend: str, device: str) -> None:
    """Shapes and values as torch's: sums over nothing are zeros, not garbage."""
    case = Case(shape, out_features, device=device)
    inputs, cotangent = case.inputs(), torch.ones((*shape[:-1], out_features), device=device)
    ours = output_and_gradients(case.ours(backend), inputs, cotangent)
    torch.testing.assert_close(ours, output_and_gradients(case.eager, inputs, cotangent))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_token_stays_alone(activation: str, backend: str, device: str) -> None:
    """NaN or Inf in a token leave the tokens beside it, in the same tile, as they were."""
    case = Case((6, 40), 32, activation=activation, device=device)
    cotangent = torch.randn(6, 32, device=device)
    laws.bad_rows_stay_alone(case.ours(backend), case.inputs(), cotangent)


# --- the boundary -------------------------------------------------------------------------------

X, W, B = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randn(20)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor; got list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have the shape \(..., in_features\)"),
        ({"x": torch.nested.nested_tensor([X[0]])}, TypeError, "x is a nested tensor"),
        ({"x": X.int()}, TypeError, "x must have one of the dtypes float16, .* got int32"),
        ({"x": X.half()}, TypeError, "x, weight and bias must have one dtype; got x float16, weight"),
        ({"x": X[..., :7]}, ValueError, r"with in_features = 7, .*got \(20, 8\)$"),
        ({"x": X.to("meta")}, ValueError, "must be on one device; got x on meta, weight on cpu"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor; got NoneType"),
        ({"weight": W.to_sparse()}, TypeError, "weight must be a dense tensor"),
        ({"weight": W.t()}, ValueError, r"got \(8, 20\); weight.t\(\) fits"),
        ({"weight": B}, ValueError, r"weight must be \(out_features, in_features\).*got \(20,\)"),
        ({"bias": B[:5]}, ValueError, r"bias must have the shape \(out_features,\) = \(20,\), or"),
        ({"bias": B[None]}, ValueError, r"bias must have the shape .* got \(1, 20\)"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor or None; got float"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .* or None; got 'tanh'"),
        ({"activation": ["relu"]}, ValueError, "activation must be one of .* or None; got"),
        ({"backend": "cuda"}, fastattn.UnsupportedError, "linear has no cuda backend"),
        ({"backend": "fast"}, ValueError, "backend must be one of .* got 'fast'"),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for _ in range(2):  # an error is not forgotten by the cache of plans
        with pytest.raises(error, match=message):
            linear(**({"x": X, "weight": W, "bias": B} | options))


def test_what_kernels_refuse() -> None:
    for tensors, activation, reason in (
        ((X, W, B), None, "nothing to fuse"),
        ((X.double(), W.double(), B.double()), "gelu", "float64"),
        (
            (X[0], torch.empty(1, 8).expand(2**24, 8), None),
            "gelu",
            "out_features 16777216 is above",
        ),
    ):
        with pytest.raises(fastattn.UnsupportedError, match=reason):
            linear(*tensors, activation, backend="triton")
    with pytest.raises(fastattn.UnsupportedError, match="forward-mode"):
        torch.func.vmap(lambda x: linear(x, W, B, "gelu", backend="triton"))(X)


def test_explain() -> None:
    explanation = explanation_of(linear, X, W.clone().requires_grad_(), None, "silu")
    assert (explanation.backend, explanation.reasons["cuda"]) == ("torch", "not in this op")
    expected = "x (2, 3, 8), out_features 20, silu, float32 on cpu, no bias, with gradients"
    assert explanation.problem == expected


def test_no_plan_is_taken_for_another() -> None:
    """Calls that differ in one fact each, twice over: the cache of plans keeps them apart."""
    interface._dispatch.plans.clear()
    calls = [
        (X, W, B),
        (X[0], W, B),
        (X, W, None),
        (X, W[:5], B[:5]),
        (X.half(), W.half(), B.half()),
    ]
    for _ in range(2):
        for tensors in calls:
            for activation in EAGER:
                expected = EAGER[activation](torch.nn.functional.linear(*tensors))
                torch.testing.assert_close(linear(*tensors, activation), expected)
                with torch.no_grad():
                    torch.testing.assert_close(linear(*tensors, activation), expected)
    leaf = W.clone().requires_grad_()
    linear(X, leaf, B, "gelu").sum().backward()  # not by the plan of inference, which is in place
    assert leaf.grad is not None


@pytest.mark.parametrize("backend", (None, *BACKENDS))
def test_autocast(backend: str | None, device: str) -> None:
    """As F.linear: computed and returned in autocast's dtype, gradients in the tensors' own."""
    case = Case((4, 8), 20, device=device)
    inputs, cotangent = case.inputs(), torch.randn(4, 20, device=device).half()
    with torch.autocast(device, torch.float16):
        ours = output_and_gradients(case.ours(backend), inputs, cotangent)
        eager = output_and_gradients(case.eager, inputs, cotangent)
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        torch.testing.assert_close(value, eager[name], rtol=2e-2, atol=2e-2)


# --- gradients, graphs and transforms -----------------------------------------------------------


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")], ids="+".join)
def test_gradients_of_some_inputs(wanted: tuple[str, ...], device: str) -> None:
    """What is frozen costs nothing: column sums only for a bias, nothing kept without gradients."""
    case = Case((66, 24), 40, device=device)
    inputs, cotangent = case.inputs(), torch.randn(66, 40, device=device)
    with launch.recorded() as launches:
        ours = output_and_gradients(case.ours("triton"), inputs, cotangent, trained=wanted)
        case.ours("triton")(**inputs)
    eager = output_and_gradients(case.eager, inputs, cotangent, trained=wanted)
    torch.testing.assert_close(ours, eager)
    sums = ["_column_sums_kernel"] if "bias" in wanted else []
    names = ["_forward_kernel", "_derivative_kernel", *sums, "_forward_kernel"]
    assert [x.kernel.__name__ for x in launches] == names
    constants = [x.constants for x in launches]
    assert constants[0]["STORE_PRE"] and constants[1]["STORE_SUMS"] == bool(sums)
    assert not constants[-1]["STORE_PRE"]


def test_same_inputs_same_bits_and_strides_of_gradients(device: str) -> None:
    case = Case((600, 40), 80, HALF, device=device)
    inputs, cotangent = case.inputs(), torch.randn(600, 80, device=device).half()
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    run = case.ours("triton")
    first = laws.same_bits(lambda: output_and_gradients(run, inputs, cotangent))
    assert first["dweight"].stride() == inputs["weight"].stride()


@pytest.mark.parametrize("save_pre", (True, False))
def test_opcheck(save_pre: bool, device: str) -> None:
    given = [t.requires_grad_() for t in Case((3, 2, 8), 12, device=device).inputs().values()]
    forward = torch.ops.fastattn.linear
    arguments = (*given, "gelu_tanh", save_pre, "triton", True)
    laws.opcheck(forward, *arguments)
    with torch.no_grad():
        out, pre = forward(*arguments)
    plain = [t.detach() for t in (torch.randn_like(out), *given)]
    for needs in ((True, True, True), (False, True, False)):
        arguments = (*plain, pre if save_pre else None, needs, "gelu_tanh", "triton", True)
        laws.opcheck(torch.ops.fastattn.linear_backward, *arguments)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    case = Case((8,), 8, device=device)
    weights = {n: t.requires_grad_() for n, t in case.inputs().items() if n != "x"}
    ours = case.ours(backend)

    def step(x: torch.Tensor) -> torch.Tensor:
        return ours(x=ours(x=x, **weights), **weights).square().sum()

    def draw(length: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(2, length, 8, device=device, requires_grad=True),)

    laws.one_graph(step, draw, list(weights.values()))


@pytest.mark.parametrize("activation", ("gelu_tanh", "gelu", "silu"))
def test_derivatives(activation: str, device: str) -> None:
    """First, second and forward-mode ones; ReLU's has a step, and no second one."""
    shapes = (3, 4), (2, 4), (2,)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def ours(*t: torch.Tensor) -> torch.Tensor:
        return linear(*t, activation)

    assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, inputs)

    floats = [t.detach().float().to(device) for t in inputs]
    laws.second_derivative(
        lambda *t: linear(*t, activation, backend="triton"),
        Case((), 2, activation=activation).eager,
        floats,
        [torch.randn(3, 2, device=device)],
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_transforms(activation: str) -> None:
    x, weight = torch.randn(5, 16).double(), torch.randn(8, 16).double()

    def ours(x: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, None, activation)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return EAGER[activation](torch.nn.functional.linear(x, weight))

    laws.functional_transforms(ours, eager, x)
