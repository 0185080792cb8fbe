"""The product of a few rows, each of its paths against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastattn.ops.linear import few_rows as module
from fastattn.ops.linear import product
from oracle import assert_close_to_reference


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which our paths are the faster ones."""
    monkeypatch.setattr(module, "mkl_is_slow", lambda: True)


# (in, out): many groups; only one group size (29 * 67); none (a prime); more inputs than the
# limit for several rows; than the one for one row; too few weights.
SIZES = [(256, 512), (64, 1943), (64, 1949), (2304, 64), (4352, 32), (16, 32)]


@pytest.mark.parametrize("threads", [1, 2, 12])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (), (2,), (4, 1), (2, 2), (5,), (0,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_f_linear(
    size: tuple[int, int],
    shape: tuple[int, ...],
    bias: bool,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight = torch.randn(*shape, size[0]), torch.randn(size[1], size[0])
    b = torch.randn(size[1]) if bias else None
    with torch.no_grad():
        out, eager = product(x, weight, b), F.linear(x, weight, b)
    reference = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert_close_to_reference(out, eager, reference)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    "strides", ["transposed", "every other", "expanded"], ids=lambda name: name
)
def test_strided_rows(strides: str) -> None:
    x = {
        "transposed": torch.randn(256, 3).t(),
        "every other": torch.randn(1, 512)[:, ::2],
        "expanded": torch.randn(1, 256).expand(4, 256),
    }[strides]
    weight, bias = torch.randn(512, 256), torch.randn(512)
    with torch.no_grad():
        torch.testing.assert_close(
            product(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4
        )


def test_the_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is promised to be faster, F.linear is not what runs, and elsewhere it is."""
    calls = []
    monkeypatch.setattr(module.F, "linear", lambda *args: calls.append(1))
    weight = torch.randn(512, 256)
    with torch.no_grad():
        for rows in (1, 2, 3, 4):
            product(torch.randn(rows, 256), weight)
        assert not calls
        for x, w in (
            (torch.randn(5, 256), weight),
            (torch.randn(1, 256).double(), weight.double()),
            (torch.randn(1, 256), torch.randn(256, 512).t()),
            (torch.randn(1, 16), torch.randn(32, 16)),
        ):
            calls.clear()
            product(x, w)
            assert calls
    calls.clear()
    product(torch.randn(1, 256), weight)  # gradients may be wanted
    assert calls


@pytest.mark.parametrize("shape", [(8,), (2, 7), (15,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_several_rows_on_intel(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by F.linear, but for fewer rows, more, and small weights."""
    monkeypatch.setattr(module, "mkl_is_slow", lambda: False)
    monkeypatch.setattr(module, "is_intel", lambda: True)
    x, weight = torch.randn(*shape, 516)[..., 2:514], torch.randn(1601, 512)
    b = torch.randn(1601) if bias else None
    reference = F.linear(x.double(), weight.double(), None if b is None else b.double())
    eager, linear, calls = F.linear(x, weight, b), F.linear, []
    monkeypatch.setattr(module.F, "linear", lambda *args: calls.append(1) or linear(*args))
    with torch.no_grad():
        out = product(x, weight, b)
        assert not calls
        assert_close_to_reference(out, eager, reference)
        assert out.is_contiguous()
        for rows, weights in ((1, weight), (7, weight), (16, weight), (8, weight[:512])):
            product(torch.randn(rows, 512), weights)
        assert len(calls) == 4


def test_elsewhere_it_is_f_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor whose own routine is fast."""
    calls = []
    monkeypatch.setattr(module, "mkl_is_slow", lambda: False)
    monkeypatch.setattr(module, "is_intel", lambda: False)
    monkeypatch.setattr(module.F, "linear", lambda *args: calls.append(1))
    with torch.no_grad():
        product(torch.randn(1, 256), torch.randn(512, 256))
    assert calls


def test_gradients_are_f_linears() -> None:
    x = torch.randn(1, 256, requires_grad=True)
    weight, bias = torch.randn(512, 256, requires_grad=True), torch.randn(512, requires_grad=True)
    got = torch.autograd.grad(product(x, weight, bias).sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.linear(x, weight, bias).sum(), (x, weight, bias))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_and_vmap() -> None:
    x, weight = torch.randn(3, 1, 256), torch.randn(512, 256)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert product(x[0], weight).dtype == torch.bfloat16
        out = torch.func.vmap(product, in_dims=(0, None))(x, weight)
        torch.testing.assert_close(out, F.linear(x, weight), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 128), (2, 512), (), (0,)], ids=str)
def test_errors_are_f_linears(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(512, 256)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            F.linear(x, weight)
        with pytest.raises(RuntimeError) as got:
            product(x, weight)
    assert str(got.value) == str(expected.value)
