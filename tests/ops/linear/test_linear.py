"""The product of a few rows, each of its paths against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastattn.ops.common.activations import ACTIVATIONS
from fastattn.ops.ffn import reference
from fastattn.ops.linear import interface as module
from fastattn.ops.linear import linear
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
        out, eager = linear(x, weight, b), F.linear(x, weight, b)
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
            linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4
        )


def test_the_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is promised to be faster, F.linear is not what runs, and elsewhere it is."""
    calls = []
    monkeypatch.setattr(module.F, "linear", lambda *args: calls.append(1))
    weight = torch.randn(512, 256)
    with torch.no_grad():
        for rows in (1, 2, 3, 4):
            linear(torch.randn(rows, 256), weight)
        assert not calls
        for x, w in (
            (torch.randn(5, 256), weight),
            (torch.randn(1, 256).double(), weight.double()),
            (torch.randn(1, 256), torch.randn(256, 512).t()),
            (torch.randn(1, 16), torch.randn(32, 16)),
        ):
            calls.clear()
            linear(x, w)
            assert calls
    calls.clear()
    linear(torch.randn(1, 256), weight)  # gradients may be wanted
    assert calls


def test_elsewhere_it_is_f_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor whose own routine is fast."""
    calls = []
    monkeypatch.setattr(module, "mkl_is_slow", lambda: False)
    monkeypatch.setattr(module.F, "linear", lambda *args: calls.append(1))
    with torch.no_grad():
        linear(torch.randn(1, 256), torch.randn(512, 256))
    assert calls


def test_gradients_are_f_linears() -> None:
    x = torch.randn(1, 256, requires_grad=True)
    weight, bias = torch.randn(512, 256, requires_grad=True), torch.randn(512, requires_grad=True)
    got = torch.autograd.grad(linear(x, weight, bias).sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.linear(x, weight, bias).sum(), (x, weight, bias))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_and_vmap() -> None:
    x, weight = torch.randn(3, 1, 256), torch.randn(512, 256)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x[0], weight).dtype == torch.bfloat16
        out = torch.func.vmap(linear, in_dims=(0, None))(x, weight)
        torch.testing.assert_close(out, F.linear(x, weight), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 128), (2, 512), (), (0,)], ids=str)
def test_errors_are_f_linears(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(512, 256)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            F.linear(x, weight)
        with pytest.raises(RuntimeError) as got:
            linear(x, weight)
    assert str(got.value) == str(expected.value)


# --- with an activation --------------------------------------------------------------------------

EAGER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def gradients(f: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """f's result and its gradients by all of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)], ids=str)
def test_activation_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str
) -> None:
    inputs = [t.to(dtype) for t in (torch.randn(*shape, 33), torch.randn(17, 33), torch.randn(17))]
    define, eager = reference.ACTIVATIONS[activation], EAGER[activation]
    exact = gradients(lambda *t: define(F.linear(*t)), *(t.double() for t in inputs))
    measure = gradients(lambda *t: eager(F.linear(*t)), *inputs)
    ours = gradients(lambda *t: linear(*t, activation), *inputs)
    with torch.no_grad():
        ours.append(linear(*inputs, activation))
    for x, y, z in zip(ours, [*measure, measure[0]], [*exact, exact[0]], strict=True):
        assert x.dtype == dtype
        assert_close_to_reference(x, y, z)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_few_rows(activation: str) -> None:
    """On the paths that are not F.linear."""
    x, weight = torch.randn(2, 256), torch.randn(512, 256)
    with torch.no_grad():
        for rows in (x, x[:1]):
            expected = EAGER[activation](F.linear(rows, weight))
            torch.testing.assert_close(
                linear(rows, weight, activation=activation), expected, atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_leaves_its_inputs_alone(activation: str) -> None:
    inputs = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8)
    before = [t.clone() for t in inputs]
    with torch.no_grad():
        linear(*inputs, activation)
    for t, was in zip(inputs, before, strict=True):
        assert torch.equal(t, was)


@pytest.mark.parametrize("activation", ("gelu_tanh", "gelu", "silu"))
def test_activation_derivatives(activation: str) -> None:
    """First, second and forward-mode ones; ReLU's has a step, and no second one."""
    inputs = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (2, 4), (2,))
    ]
    assert torch.autograd.gradcheck(
        lambda *t: linear(*t, activation), inputs, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda *t: linear(*t, activation), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_in_transforms_and_graphs(activation: str) -> None:
    x, weight, tangent = torch.randn(3, 5, 16), torch.randn(8, 16), torch.randn(3, 5, 16)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, None, activation)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return EAGER[activation](F.linear(x, weight))

    torch.testing.assert_close(torch.func.vmap(ours)(x), eager(x))
    torch.testing.assert_close(
        torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(eager, (x,), (tangent,))
    )
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(gradients(compiled, x), gradients(eager, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ("tanh", "", 1, ["relu"]))
def test_unknown_activation(activation: object) -> None:
    with pytest.raises(ValueError, match=r"activation must be one of 'gelu_tanh', .* or None; got"):
        linear(torch.randn(2, 4), torch.randn(3, 4), None, activation)  # type: ignore[arg-type]
