"""autograd.register: what a registered op does with tensors that are not plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from fastattn.ops.common import autograd


def _cube(x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return x**3, x**2


def _fake(x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0])


def _derivative(ctx: Any, dcube: torch.Tensor, dsquare: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return 3 * x**2 * dcube + 2 * x * dsquare, None


autograd.register(
    "test_cube(Tensor x, Tensor? y) -> (Tensor cube, Tensor square)",
    _cube, _fake, _keep, _derivative,
)  # fmt: skip


def cube(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.fastattn.test_cube(x, None)[0]
    return out


def test_the_derivatives() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cube, x)
    assert torch.autograd.gradgradcheck(cube, x)
    with torch.no_grad():
        assert not cube(x).requires_grad


def test_meta_tensors() -> None:
    for requires_grad in (False, True):
        out = cube(torch.ones(3, device="meta", requires_grad=requires_grad))
        assert out.device.type == "meta" and out.requires_grad == requires_grad


def _dual(x: torch.Tensor) -> None:
    with forward_ad.dual_level():
        cube(forward_ad.make_dual(x, torch.ones_like(x)))


def _jvp(x: torch.Tensor) -> None:
    torch.func.jvp(cube, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("derive", [_dual, _jvp])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_forward_mode_derivative_raises(
    derive: Callable[[torch.Tensor], None], requires_grad: bool
) -> None:
    x = torch.ones(3, requires_grad=requires_grad)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp"):
        derive(x)
    with forward_ad.dual_level():  # without a tangent
        torch.testing.assert_close(cube(2 * x), 8 * torch.ones(3))
