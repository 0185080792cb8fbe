"""Problems of ffn for the tests: drawn from a seed, run on any backend, held to the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from ops import laws
from ops.backends import BACKENDS as OF_MOST_OPS
from ops.laws import results as output_and_gradients

import fastattn

BACKENDS = (*OF_MOST_OPS, "gluon")
# Whether there is a gate, and who takes it: the kernels of `cuda` have none.
GATES = [(False, backend) for backend in BACKENDS]
GATES += [(True, backend) for backend in BACKENDS if backend != "cuda"]

Tensor = torch.Tensor
Function = Callable[..., Tensor]

ACTIVATIONS: dict[str, Function] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass
class Case:
    """One problem: what `check` draws and compares."""

    shape: tuple[int, ...]  # of x
    hidden: int
    out_features: int
    dtype: torch.dtype = torch.float32
    activation: str = "gelu_tanh"
    layout: str = "linear"
    bias1: bool = True
    bias2: bool = True
    gated: bool = False
    gate_bias: bool = True
    recompute: bool = False
    device: str = "cpu"
    seed: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """x, the weights and the biases that there are; weights scaled so that all is of size 1."""
        g = torch.Generator().manual_seed(self.seed)
        in_features = self.shape[-1]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(self.dtype).to(self.device)

        def weight(fan_in: int, fan_out: int) -> Tensor:
            shape = (fan_out, fan_in) if self.layout == "linear" else (fan_in, fan_out)
            return normal(*shape, scale=max(fan_in, 1) ** -0.5)

        tensors = {"x": normal(*self.shape), "w1": weight(in_features, self.hidden)}
        if self.bias1:
            tensors["b1"] = normal(self.hidden)
        tensors["w2"] = weight(self.hidden, self.out_features)
        if self.bias2:
            tensors["b2"] = normal(self.out_features)
        if self.gated:
            tensors["gate"] = weight(in_features, self.hidden)
            if self.gate_bias:
                tensors["gate_bias"] = normal(self.hidden)
        return tensors

    def ours(self, backend: str | None) -> Function:
        def ffn(
            x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None = None, b2: Tensor | None = None,
            **gate: Tensor,
        ) -> Tensor:  # fmt: skip
            return fastattn.ffn(
                x, w1, b1, w2, b2, self.activation, layout=self.layout, recompute=self.recompute,
                backend=backend, **gate,
            )  # fmt: skip

        return ffn

    def eager(
        self, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None = None, b2: Tensor | None = None,
        gate: Tensor | None = None, gate_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What a user of torch writes; in float64 the reference."""
        if self.layout == "conv1d":
            w1, w2, gate = w1.t(), w2.t(), gate if gate is None else gate.t()
        activation = ACTIVATIONS[self.activation]
        if gate is None:
            return F.linear(activation(F.linear(x, w1, b1)), w2, b2)
        return F.linear(activation(F.linear(x, gate, gate_bias)) * F.linear(x, w1, b1), w2, b2)


def fitted(case: Case, backend: str | None) -> Case:
    """The case with sizes that the backend takes: those of `gluon` are rounded up to eights."""
    if backend != "gluon":
        return case

    def up(size: int) -> int:
        return -(-size // 8) * 8

    shape = (*case.shape[:-1], up(case.shape[-1]))
    return replace(case, shape=shape, hidden=up(case.hidden), out_features=up(case.out_features))


def check(
    case: Case,
    backend: str | None,
    inputs: dict[str, Tensor] | None = None,
    cotangent: Tensor | None = None,
) -> dict[str, Tensor]:
    """Hold the output and every gradient of `backend` to the rule; they are returned by name."""
    case = fitted(case, backend)
    inputs = case.inputs() if inputs is None else inputs
    if cotangent is None:
        shape = (*inputs["x"].shape[:-1], case.out_features)
        g = torch.Generator().manual_seed(case.seed + 1)
        cotangent = torch.randn(shape, generator=g).to(case.dtype).to(case.device)
    ours = output_and_gradients(case.ours(backend), inputs, cotangent)
    eager = output_and_gradients(case.eager, inputs, cotangent)
    exact = output_and_gradients(case.eager, laws.doubled(inputs), cotangent)
    return laws.held(ours, eager, exact, case)
