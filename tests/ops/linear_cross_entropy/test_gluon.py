"""The `gluon` backend: the rule on its tiles, operands in every order, who is chosen."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from ops.cross_entropy.cases import HALF, Case, check

import fastattn
from fastattn.backends import explanation_of

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
    "large logits": Case((70,), 300, 24, scale=300.0, options=NONE),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, backend: str, device: str) -> None:
    """With the gradients, for which the Triton kernels read this forward's statistics."""
    check(dataclasses.replace(CASES[name], dtype=HALF, device=device), backend)


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
            options=NONE | {"logit_scale": rng.choice((1.0, 0.5))},
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


@pytest.mark.parametrize("backend", ("gluon",))
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": {}}, "gradients of one number are made in the forward"),
        ({"options": NONE | {"label_smoothing": 0.1}}, "no label_smoothing and no softcap"),
        ({"options": NONE | {"softcap": 5.0}}, "no label_smoothing and no softcap"),
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
