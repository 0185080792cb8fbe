"""Weights of 8 bits: how far they are from what was rounded, and their products in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fastattn.nn.int8_weight import (
    GROUP,
    LEVELS,
    MAX_ROWS,
    TAIL,
    Int8Weight,
    round_linear_layers,
    table_shape,
)


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    # Columns of very different sizes, as those of trained models.
    sizes = torch.logspace(-4, 2, columns)
    return (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)


SHAPES = [
    (1, 1),
    (7, 33),
    (GROUP, 5),
    (GROUP + 1, 17),  # two groups, the last one filled up
    (2 * GROUP + 5, 64),
]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_rounded_to_half_a_level_of_each_group(rows: int, columns: int) -> None:
    weight = _weight(rows, columns)
    rounded = Int8Weight.rounded(weight).dequantize()
    assert rounded.shape == weight.shape and type(rounded) is torch.Tensor
    for part in torch.arange(rows).split(table_shape(rows, columns)[2] - TAIL):
        level = (weight[part].amax(0) - weight[part].amin(0)) / LEVELS
        error = (rounded[part] - weight[part]).abs()
        assert (error <= 0.5 * level + 1e-5 * weight[part].abs().amax(0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_of_x", [1, 3, MAX_ROWS, MAX_ROWS + 1, 40])  # kernel, then not
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_product(rows: int, columns: int, rows_of_x: int, dtype: torch.dtype) -> None:
    weight = Int8Weight.rounded(_weight(rows, columns, dtype))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows_of_x, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    with torch.no_grad():
        got = F.linear(x, weight, bias)
    assert got.dtype == dtype and got.shape == (1, rows_of_x, rows)
    # The kernel has the table's numbers as they are; dequantised they are rounded to the dtype.
    exact = Int8Weight(weight.table, weight.shape).dequantize().double()
    reference = F.linear(x.double(), exact, bias.double())
    # It adds x * least and x * scale * integer, so it rounds by the largest weight of a column.
    largest = exact.abs().amax(0).expand(rows, -1)
    scale = F.linear(x.double().abs(), largest, bias.double().abs())
    unit = torch.finfo(dtype).eps * (1 if dtype != torch.float32 else columns**0.5)
    assert ((got.double() - reference).abs() <= 2 * unit * scale + 1e-30).all()


def test_kernel_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows without a gradient do not dequantise; others do."""
    weight = Int8Weight.rounded(_weight(50, 8))

    def refuse(self: Int8Weight) -> torch.Tensor:
        raise AssertionError("dequantised")

    monkeypatch.setattr(Int8Weight, "dequantize", refuse)
    with torch.no_grad():
        F.linear(torch.ones(MAX_ROWS, 8), weight)
        with pytest.raises(AssertionError, match="dequantised"):
            F.linear(torch.ones(MAX_ROWS + 1, 8), weight)
    with pytest.raises(AssertionError, match="dequantised"):
        F.linear(torch.ones(1, 8, requires_grad=True), weight)


def test_inf_and_nan_stay() -> None:
    weight = Int8Weight.rounded(_weight(50, 8))
    x = torch.ones(3, 8)
    x[0, 2], x[1, 3] = float("nan"), float("inf")
    with torch.no_grad():
        out = F.linear(x, weight)
    assert out[0].isnan().all() and not out[1].isfinite().any() and out[2].isfinite().all()


def test_gradient_of_the_input() -> None:
    weight = Int8Weight.rounded(_weight(20, 9))
    x = torch.randn(3, 9, requires_grad=True)
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1))


@pytest.mark.parametrize("rows", [11, GROUP + 30])
def test_embedding(rows: int) -> None:
    weight = Int8Weight.rounded(_weight(rows, 6))
    tokens = torch.randint(rows, (2, 5))
    assert torch.equal(F.embedding(tokens, weight), weight.dequantize()[tokens])
    assert F.embedding(tokens[:, :0], weight).shape == (2, 0, 6)
    for wrong in (rows, -1):
        with pytest.raises(IndexError, match=f"{rows} rows"):
            F.embedding(torch.tensor([wrong]), weight)
    with pytest.raises(ValueError, match="max_norm"):
        F.embedding(tokens, weight, max_norm=1.0)


def test_as_a_parameter() -> None:
    layer = torch.nn.Linear(9, 20)
    round_linear_layers(layer)
    values = layer.weight.dequantize()
    assert isinstance(layer.weight, torch.nn.Parameter) and not layer.weight.requires_grad
    other = copy.deepcopy(layer)
    assert torch.equal(other.weight.dequantize(), values)
    assert other.weight.table.data_ptr() != layer.weight.table.data_ptr()
    half = other.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and half.weight.table.dtype == torch.uint8
    assert torch.equal(layer.weight + 1, values + 1)  # any other function: of the values
    assert torch.equal(layer.state_dict()["weight"].dequantize(), values)
    for write in (lambda w: w.zero_(), lambda w: w.copy_(values), lambda w: w.mul_(2)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="would write"):
            write(layer.weight)
    with pytest.raises(ValueError, match="floating-point"):
        layer.weight.to(torch.int32)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.ones(3), "matrix"),
        (torch.ones(2, 3, 4), "matrix"),
        (torch.ones(2, 3, dtype=torch.int8), "floating-point"),
        (torch.ones(0, 3), "matrix"),
        (torch.tensor([[1.0, float("inf")]]), "inf, NaN"),
        (torch.tensor([[1.0, float("nan")]]), "inf, NaN"),
        (torch.tensor([[3e38], [-3e38]]), "too far apart"),
    ],
)
def test_refused(weight: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Int8Weight.rounded(weight)


@pytest.mark.parametrize("value", [0.0, 1.5, 1e38, 1e-44])
def test_equal_and_extreme_numbers(value: float) -> None:
    weight = torch.full((5, 4), value)
    weight[1, 1] = -value
    rounded = Int8Weight.rounded(weight).dequantize()
    torch.testing.assert_close(rounded, weight, rtol=0.01, atol=1e-38)


def test_a_table_of_another_weight() -> None:
    table = Int8Weight.rounded(torch.ones(5, 4)).table
    with pytest.raises(ValueError, match="must be"):
        Int8Weight(table, (6, 4))
    with pytest.raises(ValueError, match="uint8"):
        Int8Weight(table.float(), (5, 4))
