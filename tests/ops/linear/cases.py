"""Problems of linear for the tests: drawn from a seed, run on any backend, held to the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ops import laws
from ops.laws import results as output_and_gradients

from fastattn.ops.linear import linear
from oracle import assert_close_to_reference

BACKENDS = ("reference", "torch", "triton")

Tensor = torch.Tensor
Function = Callable[..., Tensor]

EAGER: dict[str | None, Function] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    None: lambda x: x,
}


@dataclass
class Case:
    """One problem: what `check` draws and compares."""

    shape: tuple[int, ...]  # of x
    out_features: int
    dtype: torch.dtype = torch.float32
    activation: str | None = "gelu_tanh"
    bias: bool = True
    device: str = "cpu"
    seed: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """x, weight and the bias if there is one; the weight scaled so that all is of size 1."""
        g = torch.Generator().manual_seed(self.seed)
        in_features = self.shape[-1]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(self.dtype).to(self.device)

        weight = normal(self.out_features, in_features, scale=max(in_features, 1) ** -0.5)
        tensors = {"x": normal(*self.shape), "weight": weight}
        return tensors | ({"bias": normal(self.out_features)} if self.bias else {})

    def ours(self, backend: str | None) -> Function:
        return lambda x, weight, bias=None: linear(
            x, weight, bias, self.activation, backend=backend
        )

    def eager(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What a user of torch writes; in float64 the reference."""
        return EAGER[self.activation](F.linear(x, weight, bias))


def check(
    case: Case, backend: str | None, inputs: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Hold the output and every gradient of `backend` to the rule; they are returned by name."""
    inputs = case.inputs() if inputs is None else inputs
    g = torch.Generator().manual_seed(case.seed + 1)
    cotangent = torch.randn((*inputs["x"].shape[:-1], case.out_features), generator=g)
    cotangent = cotangent.to(case.dtype).to(case.device)
    ours = output_and_gradients(case.ours(backend), inputs, cotangent)
    eager = output_and_gradients(case.eager, inputs, cotangent)
    exact = output_and_gradients(case.eager, laws.doubled(inputs), cotangent)
    laws.held(ours, eager, exact, case)
    with torch.no_grad():  # where the torch backend is in place, and the kernels keep nothing
        out = case.ours(backend)(**inputs)
    assert_close_to_reference(out, eager["out"], exact["out"], name="out without gradients")
    return ours
