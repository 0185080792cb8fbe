"""The `gluon` backend: the rule on its tiles, operands in every order, who is chosen."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from ops import laws
from ops.cross_entropy.cases import BF16, HALF, OPTIONS, Case, check, outputs_and_gradients

import fastattn
from fastattn import backends, proving
from fastattn.backends import explanation_of
from fastattn.ops.common import gluon as kernels
from fastattn.ops.cross_entropy.problem import Options
from fastattn.ops.linear_cross_entropy import gluon
from fastattn.ops.linear_cross_entropy.gluon.gradients import OnHopper

NONE = {"reduction": "none"}
# A tile is 192 rows by 256 classes; a trip has 64 terms of the sums.
CASES = {
    "one row, one box of terms": Case((), 5, 8, options=NONE),
    "a tile, whole": Case((192,), 256, 64, options=NONE),
    "one row and one class beyond a tile": Case((193,), 257, 72, bias=True, options=NONE),
    "a half without classes": Case((3, 7), 100, 16, options=NONE),
    "more terms than stages": Case((70,), 40, 64 * 5 + 8, options=NONE),
    "more tiles than programs": Case((400,), 700, 16, bias=True, options=NONE),
    "options": Case(
        (70,), 300, 24, bias=True, weighted=True,
        options=NONE | {"z_loss": 1e-2, "logit_scale": 0.25, "ignore_index": 3},
    ),
    "smoothed, several tiles": Case(
        (200,), 600, 24, weighted=True, options=NONE | {"label_smoothing": 0.3}
    ),
    "a cap far away": Case((70,), 300, 24, scale=0.3, options=NONE | {"softcap": 50.0}),
    "a mean, several tiles": Case((200,), 601, 72, bias=True),
    "a mean in chunks": Case((900,), 264, 8, bias=True),
    "a mean of all options": Case(
        (70,), 300, 24, bias=True, weighted=True, options=OPTIONS["everything, mean"]
    ),
    "large logits, a sum": Case((70,), 300, 24, scale=300.0, options={"reduction": "sum"}),
    "large logits": Case((70,), 300, 24, scale=300.0, options=NONE),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("dtype", (HALF, pytest.param(BF16, marks=pytest.mark.long)))
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    check(dataclasses.replace(CASES[name], dtype=dtype, device=device), backend)


@pytest.mark.parametrize("backend", ("gluon",))
def test_any_strides(backend: str, device: str) -> None:
    case = Case((2, 6), 9, 16, dtype=HALF, bias=True, options=NONE, device=device)
    x, weight, bias = case.inputs().values()
    expected = case.ours(backend)(x=x, weight=weight, bias=bias)
    for change in (
        {"x": x.transpose(0, 1).contiguous().transpose(0, 1)},
        {"x": torch.cat([x[..., :1], x], -1)[..., 1:]},
        {"weight": weight.t().contiguous().t()},
        {"weight": weight.repeat_interleave(2, 1)[:, ::2]},
        {"bias": bias.repeat_interleave(2)[::2]},
    ):
        given = {"x": x, "weight": weight, "bias": bias} | change
        assert torch.equal(case.ours(backend)(**given), expected)
        explanation = explanation_of(
            fastattn.linear_cross_entropy, **given, targets=case.others()[0], backend=backend
        )
        laws.copies_are_told(explanation, case.ours(backend), **given)


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize(
    "first", (0, *(pytest.param(n, marks=pytest.mark.long) for n in range(5, 100, 5)))
)
def test_random_problems(first: int, backend: str, device: str) -> None:
    for seed in range(first, first + 5):
        rng = random.Random(seed)
        case = Case(
            tuple(rng.randint(1, 20) for _ in range(rng.randint(0, 2))),
            rng.randint(1, 600),
            8 * rng.randint(1, 20),
            dtype=HALF,
            bias=rng.random() < 0.5,
            weighted=rng.random() < 0.5,
            options={
                "reduction": rng.choice(("none", "none", "sum")),
                "logit_scale": rng.choice((1.0, 0.5)),
                "label_smoothing": rng.choice((0.0, 0.2)),
                "softcap": rng.choice((0.0, 0.0, 3.0)),
                "z_loss": rng.choice((0.0, 1e-2)),
            },
            device=device,
            seed=seed,
        )
        check(case, backend)


@pytest.mark.parametrize("backend", ("gluon",))
def test_a_mean_without_gradients(backend: str, device: str) -> None:
    case = Case((20,), 30, 16, dtype=HALF, device=device)
    inputs = case.inputs()
    ours, exact = case.ours(backend)(**inputs), case.ours("reference")(**inputs)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


FORWARD, GRADIENT, PRODUCT = "linear_loss_forward", "linear_loss_backward", "product_kernel"


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize(
    ("wanted", "products"),
    [((), 0), (("bias",), 0), (("x",), 1), (("weight",), 1), (("x", "weight", "bias"), 2)],
)
def test_what_is_launched(
    wanted: tuple[str, ...],
    products: int,
    reduction: str,
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    """What is frozen costs nothing; float16's dweight is ATen's."""
    launched: list[str] = []
    run = kernels.launch

    def spy(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        run(kernel, *args, **constants)

    monkeypatch.setattr(kernels, "launch", spy)
    options = {"reduction": reduction}
    case = Case((20,), 30, 16, dtype=dtype, bias=True, options=options, device=device)
    leaves = {n: x.requires_grad_(n in wanted) for n, x in case.inputs().items()}
    loss = case.ours(backend)(**leaves)
    if wanted:
        torch.autograd.grad(loss.sum(), [leaves[n] for n in wanted])
    products -= dtype == HALF and "weight" in wanted
    if reduction == "none":
        assert launched == [FORWARD] + [GRADIENT] * bool(wanted) + [PRODUCT] * products
    elif wanted:
        assert launched == [PRODUCT] * (1 + products)
    else:
        assert launched == [FORWARD]


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_the_schedule_changes_no_bit(
    reduction: str, backend: str, gluon_seed: Callable[[int], None], device: str
) -> None:
    options = {"reduction": reduction, "label_smoothing": 0.1}
    case = Case((200,), 300, 72, dtype=HALF, bias=True, options=options, device=device)
    upstream = torch.rand(200 if reduction == "none" else (), device=device)
    results = []
    for seed in range(3):
        gluon_seed(seed)
        results.append(outputs_and_gradients(case.ours(backend), case.inputs(), upstream))
    for name, first in results[0].items():
        assert all(torch.equal(result[name], first) for result in results), name


@pytest.mark.parametrize("backend", ("gluon",))
def test_a_target_that_is_no_class_reaches_only_its_row(backend: str, device: str) -> None:
    """On a GPU nobody looks at the targets before: the loss is NaN, and no memory is read."""
    x, weight, bias = Case((20,), 30, 16, dtype=HALF, bias=True, device=device).inputs().values()
    targets = torch.arange(20, device=device)
    class_weight = torch.rand(30, device=device)
    options = Options(-100, 0.1, 0.0, 1.0, 0.0, "none")
    wrong = targets.clone()
    wrong[[3, 7, 12]] = torch.tensor([30, -5, 2**32 + 1], device=device)
    right = torch.ones(20, dtype=torch.bool, device=device)
    right[[3, 7, 12]] = False
    results = []
    for given in (targets, wrong):
        tensors = x, weight, bias, given, class_weight
        losses, statistics, _ = gluon.kernel_forward(*tensors, options, (False,) * 3)
        dx, *_ = gluon.kernel_backward(
            torch.ones(20, device=device), *tensors, statistics, options, (True, False, False)
        )
        results.append((losses, dx))
    assert results[1][0][~right].isnan().all()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[right], b[right])


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("keep", ((True, True, True), (False, True, False), (False, False, False)))
def test_opcheck(keep: tuple[bool, ...], backend: str, device: str) -> None:
    case = Case((6,), 10, 16, dtype=HALF, bias=True, weighted=True, device=device)
    targets, class_weight = case.others()
    x, weight, bias = (t.requires_grad_() for t in case.inputs().values())
    rest = -100, 0.1, 1e-3, 0.5, 5.0, backend, True
    op = torch.ops.fastattn.linear_cross_entropy
    tensors = x, weight, bias, targets, class_weight
    laws.opcheck(op, *tensors, any(keep), keep, *rest)
    if not any(keep):
        with torch.no_grad():
            losses, statistics, *_ = op(*tensors, False, keep, *rest)
        backward = torch.ops.fastattn.linear_cross_entropy_backward
        laws.opcheck(backward, losses, *tensors, statistics, (True,) * 3, *rest)


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compiles_without_a_graph_break(reduction: str, backend: str, device: str) -> None:
    weight = torch.randn(10, 16, device=device).half().requires_grad_()

    def step(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return fastattn.linear_cross_entropy(
            x, weight, targets, label_smoothing=0.1, reduction=reduction, backend=backend
        )

    def draw(rows: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(rows, 16, device=device).half().requires_grad_()
        return x, torch.randint(10, (rows,), device=device)

    laws.one_graph(step, draw, [weight], frames=None)


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("dtype", (HALF, BF16))
def test_its_proof_passes(dtype: torch.dtype, reduction: str, backend: str, device: str) -> None:
    """And that of a kernel whose gradient is wrong does not."""
    options = OPTIONS["everything"] | {"reduction": reduction}
    case = Case((9,), 24, 16, dtype=dtype, bias=True, weighted=True, options=options, device=device)
    targets, class_weight = case.others()
    x, weight, bias = (t.requires_grad_() for t in case.inputs().values())
    problem = backends.problem_of(
        fastattn.linear_cross_entropy, x, weight, targets, bias, class_weight=class_weight,
        **options,
    )[0]  # fmt: skip
    about = proving.subject(backend, problem)
    assert about is not None
    passed, told = proving._compared(about, problem)
    assert passed, told
    multiply = OnHopper.multiply
    with mock.patch.object(OnHopper, "multiply", lambda self, *given: 1.2 * multiply(self, *given)):
        assert not proving._compared(about, problem)[0]


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"features": 12}, "D must be in steps of 8, and it is 12"),
        ({"shape": (0,)}, "no descriptor of an empty tensor"),
        ({"dtype": torch.float32}, "float16 and bfloat16, not in torch.float32"),
    ],
)
def test_what_the_kernel_declines(change: dict[str, Any], reason: str, backend: str) -> None:
    case = dataclasses.replace(Case((3,), 10, 16, dtype=HALF, options=NONE), **change)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        case.ours(backend)(**inputs)
    case.ours(None)(**inputs)


@pytest.mark.parametrize("backend", ("gluon",))
def test_it_is_chosen_only_by_name(backend: str, device: str) -> None:
    case = Case((3,), 10, 16, dtype=HALF, options=NONE, device=device)
    targets, _ = case.others()
    x, weight = case.inputs().values()
    explanation = explanation_of(fastattn.linear_cross_entropy, x, weight, targets)
    assert explanation.backend != backend
    assert backend in str(explanation.reasons[backend])
