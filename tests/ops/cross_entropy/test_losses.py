"""What cross_entropy and linear_cross_entropy owe alike, on every backend, against float64."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from ops.cross_entropy.cases import (
    BF16,
    DOUBLE,
    FLOAT,
    HALF,
    OPTIONS,
    Case,
    check,
    outputs_and_gradients,
)

import fastattn
from fastattn.backends import triton_runs
from fastattn.ops.cross_entropy import IGNORED
from fastattn.ops.cross_entropy import aten as of_logits
from fastattn.ops.linear_cross_entropy import aten as of_heads

BACKENDS = ("reference", "torch", "triton")
# None: the loss of logits. Else that of a head with so many features, and a bias.
WHICH = {"logits": None, "head": 12}
OF_BOTH = pytest.mark.parametrize("features", WHICH.values(), ids=WHICH)
PAIRS = [pytest.param(n, b, id=f"{name}-{b}") for name, n in WHICH.items() for b in BACKENDS]
ON_ALL = pytest.mark.parametrize(("features", "backend"), PAIRS)
GLUON = pytest.param(WHICH["head"], "gluon", id="head-gluon")  # 16 bits, and no empty tensors
AND_GLUON = pytest.mark.parametrize(("features", "backend"), [*PAIRS, GLUON])
REDUCTIONS = pytest.mark.parametrize("reduction", ("none", "sum", "mean"))


@AND_GLUON
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(
    name: str, weighted: bool, features: int | None, backend: str, device: str
) -> None:
    case = Case((3, 10), 21, features, weighted=weighted, options=OPTIONS[name], device=device)
    check(dataclasses.replace(case, bias=weighted).on(backend), backend)


@AND_GLUON
@pytest.mark.parametrize("dtype", (HALF, BF16, DOUBLE))
@pytest.mark.parametrize("name", ("plain", "sum", "everything"))
def test_dtypes(
    name: str, dtype: torch.dtype, features: int | None, backend: str, device: str
) -> None:
    no_dot = features is not None and dtype == BF16 and triton_runs() == "interpreted"
    if (backend == "triton" and no_dot) or (backend in ("triton", "gluon") and dtype == DOUBLE):
        pytest.skip("it declines them")
    options = OPTIONS[name]
    case = Case((2, 20), 40, features, dtype, bias=True, options=options, device=device)
    check(dataclasses.replace(case, weighted=features is None).on(backend), backend)


SHAPES: list[tuple[tuple[int, ...], int, int | None]] = [
    ((), 5, None),  # one row
    ((), 5, 3),
    ((1,), 7, None),
    ((1,), 7, 1),
    ((3,), 1, None),  # one class: the loss is 0
    ((3,), 1, 4),
    ((2, 3, 2), 11, None),
    ((2, 3, 2), 11, 17),
    ((5,), 4099, None),  # several blocks of the kernels, the last not full
    ((70,), 33, None),  # several rows a program, the last not full
    ((130,), 140, 33),  # several tiles both ways, none full, unaligned
    ((130,), 200, 64),  # aligned
]


@pytest.mark.parametrize(
    ("shape", "classes", "features", "backend"),
    [
        (*sizes, backend)
        for sizes in SHAPES
        for backend in (*BACKENDS, *["gluon"] * (sizes[2] is not None))
    ],
)
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_shapes(
    reduction: str, shape: tuple[int, ...], classes: int, features: int | None, backend: str,
    device: str,
) -> None:  # fmt: skip
    options = {"reduction": reduction}
    case = Case(shape, classes, features, ignored=0, options=options, device=device)
    check(case.on(backend), backend)


@ON_ALL
@REDUCTIONS
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty(
    shape: tuple[int, ...], reduction: str, features: int | None, backend: str, device: str
) -> None:
    options = {"reduction": reduction}
    case = Case(shape, 5, features, bias=True, options=options, device=device)
    upstream = torch.ones(shape if reduction == "none" else ())
    ours = outputs_and_gradients(case.ours(backend), case.inputs(), upstream)
    eager = outputs_and_gradients(case.eager, case.inputs(), upstream)
    torch.testing.assert_close(ours, eager, equal_nan=True)


@AND_GLUON
@REDUCTIONS
@pytest.mark.parametrize("name", ("plain", "everything"))
def test_no_target_counts(
    name: str, reduction: str, features: int | None, backend: str, device: str
) -> None:
    """As F.cross_entropy: the mean is 0 / 0, and the gradients are 0."""
    options = OPTIONS[name] | {"reduction": reduction}
    case = Case((4,), 6, features, bias=True, ignored=1.0, options=options, device=device)
    case = case.on(backend)
    upstream = torch.ones((4,) if reduction == "none" else ())
    ours = outputs_and_gradients(case.ours(backend), case.inputs(), upstream)
    loss = ours.pop("loss")
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert all((grad == 0).all() for grad in ours.values())


@AND_GLUON
def test_int32_targets(features: int | None, backend: str, device: str) -> None:
    check(Case((12,), 7, features, targets=torch.int32, device=device).on(backend), backend)


@AND_GLUON
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_same_inputs_same_bits(
    reduction: str, features: int | None, backend: str, device: str
) -> None:
    options = OPTIONS["everything"] | {"reduction": reduction}
    case = Case((70,), 300, features, bias=True, weighted=True, options=options, device=device)
    upstream = torch.rand(70 if reduction == "none" else ())
    case = case.on(backend)
    run = case.ours(backend)
    laws.same_bits(lambda: outputs_and_gradients(run, case.inputs(), upstream))


# --- the boundary ---------------------------------------------------------------------------------


@pytest.fixture(params=(False, True), ids=("few", "many"))
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the torch backend takes these logits for many, by its blocks or chunks."""
    for module in (of_logits, of_heads):
        monkeypatch.setattr(module, "LARGE", 1 if request.param else 1 << 20)


@ON_ALL
@pytest.mark.parametrize("wrong", (8, -1, -101))
def test_targets_that_are_no_class(
    wrong: int, features: int | None, large: None, backend: str
) -> None:
    """Also where a plan is there already, and where F.cross_entropy is who finds out."""
    targets, inputs = torch.randint(8, (2, 3)), Case((2, 3), 8, features).inputs()

    def loss(**options: Any) -> None:
        if features is None:
            fastattn.cross_entropy(inputs["logits"], targets, backend=backend, **options)
        else:
            fastattn.linear_cross_entropy(**inputs, targets=targets, backend=backend, **options)

    loss()
    targets[1, 1] = wrong
    with pytest.raises(IndexError, match=str(wrong)):
        loss()
    loss(ignore_index=wrong)


@OF_BOTH
@pytest.mark.parametrize("name", ("plain", "none", "everything", "everything, mean"))
def test_derivatives(name: str, features: int | None, large: None) -> None:
    """The first and the second, of both ways of the torch backend."""
    case = Case((4,), 5, features and 3, DOUBLE, bias=True, weighted=True, options=OPTIONS[name])
    assert IGNORED in case.others()[0]
    inputs, run = case.inputs(), case.ours("torch")

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return run(**dict(zip(inputs, leaves, strict=True)))

    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@OF_BOTH
def test_second_derivative_of_the_kernels(features: int | None) -> None:
    case = Case((2, 3), 8, features, bias=True, options=OPTIONS["everything, mean"])
    inputs = case.inputs()

    def on(backend: str) -> Any:
        return lambda *x: case.ours(backend)(**dict(zip(inputs, x, strict=True)))

    cotangent = torch.tensor(0.7)
    laws.second_derivative(on("triton"), on("reference"), list(inputs.values()), [cotangent])


@OF_BOTH
def test_functional_transforms(features: int | None) -> None:
    """Left to themselves they find a differentiable backend; a kernel that is named says no."""
    case = Case((2, 3), 8, features, DOUBLE, bias=True)
    inputs, (targets, _) = case.inputs(), case.others()
    name, x = next(iter(inputs.items()))

    def of(run: Any) -> Any:
        return lambda x: run(**inputs | {name: x})

    def plain(x: torch.Tensor) -> torch.Tensor:
        logits = x if features is None else F.linear(x, inputs["weight"], inputs["bias"])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    laws.functional_transforms(of(case.ours(None)), plain, x)
    laws.kernels_refuse_transforms(of(case.ours("triton")), x)


def test_vmap_of_targets_too() -> None:
    """Which then have no values to check."""
    x, weight, targets = torch.randn(2, 3, 4), torch.randn(8, 4), torch.randint(8, (2, 3))
    for loss in (
        lambda x, t: fastattn.cross_entropy(x @ weight.t(), t),
        lambda x, t: fastattn.linear_cross_entropy(x, weight, t),
    ):
        each = torch.func.vmap(torch.func.grad(loss))(x, targets)
        single = torch.func.grad(lambda x: F.cross_entropy(x @ weight.t(), targets[1]))(x[1])
        torch.testing.assert_close(each[1], single)


@ON_ALL
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compiles_without_a_graph_break(reduction: str, features: int | None, backend: str) -> None:
    """The logits of a head are not in the graph, but for the reference."""
    weights = [] if features is None else [torch.randn(8, features, requires_grad=True)]
    loss = fastattn.linear_cross_entropy if weights else fastattn.cross_entropy

    def step(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss(x, *weights, targets, label_smoothing=0.1, reduction=reduction, backend=backend)

    def draw(rows: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(rows, features or 8, requires_grad=True), torch.randint(8, (rows,))

    laws.one_graph(step, draw, weights, frames=None)


@OF_BOTH
def test_meta_tensors(features: int | None) -> None:
    case = Case((2, 3), 8, features, options={"reduction": "none"}, device="meta")
    loss = case.ours(None)(**case.inputs())
    assert loss.shape == (2, 3) and loss.device.type == "meta"


@pytest.mark.fuzz
@AND_GLUON
def test_fuzz(features: int | None, backend: str, pytestconfig: pytest.Config, device: str) -> None:
    draws, seed = (pytestconfig.getoption(name) for name in ("--draws", "--seed"))
    for number in range(seed, seed + draws // 3):
        check(drawn(number, features is not None, device).on(backend), backend)


def drawn(number: int, head: bool, device: str) -> Case:
    """A problem with any options, of any size up to some dozens."""
    draw = random.Random(number)
    options = {
        "reduction": draw.choice(("none", "sum", "mean")),
        "label_smoothing": draw.choice((0.0, 0.0, 0.1, draw.random())),
        "z_loss": draw.choice((0.0, 1e-4, 0.1)),
        "logit_scale": draw.choice((1.0, 0.0625, 2.0)),
        "softcap": draw.choice((0.0, 0.0, 2.0, 30.0)),
        "ignore_index": draw.choice((IGNORED, -1, 0)),
    }
    rows = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 3)))
    classes = draw.choice((2, draw.randint(2, 90)))
    dtype = draw.choice((FLOAT, FLOAT, HALF))
    case = Case(
        rows, classes, dtype=dtype, weighted=draw.random() < 0.5, scale=draw.choice((0.1, 2.0)),
        ignored=draw.choice((0.0, 0.3)), options=options, device=device, seed=number,
    )  # fmt: skip
    if head:
        draw = random.Random(-number)
        features = draw.choice((1, 16, 64, draw.randint(1, 90)))
        case = dataclasses.replace(case, features=features, bias=draw.random() < 0.5)
    targets, _ = case.others()
    if (targets == options["ignore_index"]).all():  # 0 / 0 has no error to compare
        return dataclasses.replace(case, options=options | {"reduction": "sum"})
    return case
