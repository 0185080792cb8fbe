"""A call of ffn apart from its data, and every error that a user can make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.activations import check_activation
from fastattn.ops.common.dense import dtype_name
from fastattn.ops.common.factors import check_factors

LAYOUTS = ("linear", "conv1d")

# What the two sizes of a weight mean, by layout: as torch.nn.Linear or as GPT-2's Conv1D has them.
_AXES = {
    "w1": {"linear": "(hidden, in_features)", "conv1d": "(in_features, hidden)"},
    "w2": {"linear": "(out_features, hidden)", "conv1d": "(hidden, out_features)"},
    "gate": {"linear": "(hidden, in_features)", "conv1d": "(in_features, hidden)"},
}
_OPTIONAL = ("b1", "b2", "gate", "gate_bias")


@dataclass(frozen=True)
class FFNProblem:
    """Metadata of one call; `check()` has passed before a backend sees it."""

    x_shape: tuple[int, ...]  # (..., in_features)
    hidden: int
    out_features: int
    dtype: torch.dtype  # of the computation and the result: autocast's, where autocast is on
    device: torch.device
    activation: str
    layout: str
    recompute: bool
    has_bias1: bool
    has_bias2: bool
    gated: bool
    has_gate_bias: bool
    autocast: bool
    needs_grad: bool
    transformed: bool

    op = "ffn"

    @property
    def elements(self) -> int | None:
        """The problem's size where backends are compared (measured.py).

        The multiplications of the first product; None with `recompute` or a gate, which are not
        compared.
        """
        return None if self.recompute or self.gated else math.prod(self.x_shape) * self.hidden

    @property
    def in_features(self) -> int:
        return self.x_shape[-1]

    @property
    def conv1d(self) -> bool:
        """Whether the weights are (in, out), else (out, in)."""
        return self.layout == "conv1d"

    def describe(self) -> str:
        features = [
            "no b1" if not self.has_bias1 else "",
            "no b2" if not self.has_bias2 else "",
            "gated" if self.gated else "",
            "no gate_bias" if self.gated and not self.has_gate_bias else "",
            "recompute" if self.recompute else "",
            "under autocast" if self.autocast else "",
            "with gradients" if self.needs_grad else "",
            "under a torch.func transform or forward-mode AD" if self.transformed else "",
        ]
        sizes = f"x {tuple(self.x_shape)}, hidden {self.hidden}, out_features {self.out_features}"
        kind = f"{self.activation}, layout {self.layout}, {dtype_name(self.dtype)} on {self.device}"
        return ", ".join([sizes, kind, *filter(None, features)])


def describe(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str = "gelu_tanh",
    *,
    gate: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    layout: str = "linear",
    recompute: bool = False,
) -> FFNProblem:
    """The problem of a call. Raises TypeError or ValueError for every error of the caller."""
    check(x, w1, b1, w2, b2, gate, gate_bias, activation, layout, recompute)
    autocast = modes.autocast_dtype(x.device.type)
    if x.dtype == torch.float64:  # autocast leaves float64 alone
        autocast = None
    hidden, out_features = (0, 0) if layout == "linear" else (1, 1)
    return FFNProblem(
        x_shape=x.shape,
        hidden=w1.shape[hidden],
        out_features=w2.shape[out_features],
        dtype=x.dtype if autocast is None else autocast,
        device=x.device,
        activation=activation,
        layout=layout,
        recompute=recompute,
        has_bias1=b1 is not None,
        has_bias2=b2 is not None,
        gated=gate is not None,
        has_gate_bias=gate_bias is not None,
        autocast=autocast is not None,
        needs_grad=modes.needs_grad(x, w1, b1, w2, b2, gate, gate_bias),
        transformed=modes.transformed(),
    )


def check(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    layout: str,
    recompute: bool,
) -> None:
    """Raise for whatever the caller got wrong; the only place of the op that does."""
    check_activation(activation)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be True or False; got {type(recompute).__name__}")
    tensors = {
        "x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "gate": gate, "gate_bias": gate_bias,
    }  # fmt: skip
    check_factors(tensors, _OPTIONAL)
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias is the bias of gate, which is None: give gate, or no gate_bias")
    if x.dim() == 0:
        raise ValueError(
            "x must have the shape (..., in_features); got a tensor without dimensions"
        )
    for name, weight in (("w1", w1), ("w2", w2), ("gate", gate)):
        if weight is not None and weight.dim() != 2:
            raise ValueError(
                f"{name} must have 2 dimensions {_AXES[name][layout]}; "
                f"got shape {tuple(weight.shape)}"
            )
    _check_sizes(x, w1, b1, w2, b2, layout)
    _check_gate(w1, gate, gate_bias, layout)


def _check_sizes(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    layout: str,
) -> None:
    """That the sizes of x, w1 and w2 chain, and that the biases fit."""
    in_features = x.shape[-1]
    # The weights' shapes as (in, out), whatever the layout.
    first, second = (w.shape if layout == "conv1d" else w.shape[::-1] for w in (w1, w2))
    hint = ""
    if (first[1], first[0]) == (in_features, second[1]):  # transposed, they would chain
        other = "conv1d" if layout == "linear" else "linear"
        hint = f"; the weights fit layout={other!r}"
    if first[0] != in_features:
        raise ValueError(
            f"w1 must be {_AXES['w1'][layout]} with in_features = {in_features}, the last size of "
            f"x {tuple(x.shape)}, in layout={layout!r}; got {tuple(w1.shape)}{hint}"
        )
    if second[0] != first[1]:
        raise ValueError(
            f"w2 must be {_AXES['w2'][layout]} with hidden = {first[1]}, as w1 {tuple(w1.shape)} "
            f"has it in layout={layout!r}; got {tuple(w2.shape)}{hint}"
        )
    for name, bias, size, of in (
        ("b1", b1, first[1], "hidden"),
        ("b2", b2, second[1], "out_features"),
    ):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(
                f"{name} must have the shape ({of},) = ({size},), or be None; "
                f"got {tuple(bias.shape)}"
            )


def _check_gate(
    w1: torch.Tensor, gate: torch.Tensor | None, gate_bias: torch.Tensor | None, layout: str
) -> None:
    """That the gate has the shape of w1, and its bias fits."""
    if gate is None:
        return
    if gate.shape != w1.shape:
        fix = "; gate.t() has it" if gate.t().shape == w1.shape else ""
        raise ValueError(
            f"gate must have the shape of w1, {_AXES['gate'][layout]} = {tuple(w1.shape)}; "
            f"got {tuple(gate.shape)}{fix}"
        )
    hidden = w1.shape[1 if layout == "conv1d" else 0]
    if gate_bias is not None and tuple(gate_bias.shape) != (hidden,):
        raise ValueError(
            f"gate_bias must have the shape (hidden,) = ({hidden},), or be None; "
            f"got {tuple(gate_bias.shape)}"
        )
