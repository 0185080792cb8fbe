"""Linear layers with an activation between, and dropout at most.

    fc2(act(fc1(x)))                    an MLP
    fc2(act(gate(x)) * fc1(x))          a gated one; gate and fc1 may be the two halves of one layer

The layers are `torch.nn.Linear` or GPT-2's `Conv1D`, whose weight lies the other way. Which
activation it is, its values tell; where a module keeps none (its forward calls a function), all are
tried. The layers' sizes tell which is which, but not gate from fc1: both ways are tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar

import torch

from fastattn.backends import explanation_of
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.nn.feed_forward import ACTIVATIONS
from fastattn.nn.plain import is_plain
from fastattn.ops.ffn import ffn

Halves = Callable[[torch.Tensor, int], Sequence[torch.Tensor]]

# (gate, fc1) of what one layer has for both, along the dimension of its results: views.
HALVES: dict[str, Halves] = {
    "gate first": lambda joint, dim: joint.chunk(2, dim),
    "gate last": lambda joint, dim: joint.chunk(2, dim)[::-1],
    "interleaved, gate first": lambda joint, dim: _interleaved(joint, dim),
    "interleaved, gate last": lambda joint, dim: _interleaved(joint, dim)[::-1],
}


def _interleaved(joint: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
    return joint.unflatten(dim, (-1, 2)).unbind(dim + 1)


@dataclass(frozen=True)
class FeedForward:
    """An MLP, and the names under which a module keeps its parts.

    Attributes:
        gate: the layer of the gate, None if there is none or `fc1` has both.
        halves: how they lie in `fc1` if it has both, a key of HALVES.
        layout: "linear" or "conv1d", as `fastattn.ffn` has it.
        activation: as `fastattn.ffn` has it; None for one that it has not.
        act: the attribute with the activation, None if there is none.
        act_type: the class of what is there, or the function.
        dropout: the module that drops elements of the output; dropouts of the hidden layer are in
            `inside`.
    """

    gate: str | None
    fc1: str
    fc2: str
    halves: str | None
    layout: str
    activation: str | None
    act: str | None
    act_type: Any
    dropout: str | None
    inside: tuple[str, ...]

    def __str__(self) -> str:
        if self.halves is not None:
            return f"gated MLP of {self.fc1} ({self.halves}), {self.activation}, {self.fc2}"
        if self.gate is not None:
            return f"gated MLP of {self.gate}, {self.activation}, {self.fc1}, {self.fc2}"
        return f"MLP of {self.fc1}, {self.activation}, {self.fc2}"

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.fc1, self.fc2) if self.gate is None else (self.gate, self.fc1, self.fc2)

    def arguments(self, module: Any, x: torch.Tensor) -> dict[str, Any]:
        """Those of `ffn`."""
        fc1, fc2 = module._modules[self.fc1], module._modules[self.fc2]
        w1, b1, gate, gate_bias = fc1.weight, fc1.bias, None, None
        if self.gate is not None:
            gated = module._modules[self.gate]
            gate, gate_bias = gated.weight, gated.bias
        elif self.halves is not None:
            of = HALVES[self.halves]
            gate, w1 = of(w1, 1 if self.layout == "conv1d" else 0)
            if b1 is not None:
                gate_bias, b1 = of(b1, 0)
        return {
            "x": x, "w1": w1, "b1": b1, "w2": fc2.weight, "b2": fc2.bias, "gate": gate,
            "gate_bias": gate_bias, "activation": self.activation, "layout": self.layout,
        }  # fmt: skip


class FeedForwardSwap(torch.nn.Module):
    """Runs a module on `fastattn.ffn`; the original where a part of it has to be called itself."""

    _fastattn_bound: ClassVar[FeedForward]

    @staticmethod
    def recogniser(bound: FeedForward) -> Recogniser:
        return recogniser(bound)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._fastattn_bound
        # At every call, because hooks, adapters and parametrisations come and go.
        if len(args) != 1 or kwargs or _refusal(self, bound) or _drops(self, bound.inside):
            return super().forward(*args, **kwargs)
        out = ffn(**bound.arguments(self, args[0]))
        return out if bound.dropout is None else self._modules[bound.dropout](out)  # type: ignore[misc]


def recogniser(bound: FeedForward) -> Recogniser:
    def probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
        x = draw.normal(2, 7, sizes(module._modules[bound.fc1])[0])
        return [Probe((x,)), Probe((20 * x,))]  # and where an activation may be cut off

    def backend(module: torch.nn.Module, probe: Probe) -> str | None:
        return explanation_of(ffn, **bound.arguments(module, probe.args[0])).backend

    return Recogniser(
        words=str(bound),
        mixin=FeedForwardSwap,
        probes=probes,
        backend=backend,
        refusal=lambda module: _refusal(module, bound),
        premise=lambda module, draw: _misplaced(module, bound, draw),
        bound=bound,
        fused=lambda module: [getattr(module, n) for n in (*bound.layers, bound.act) if n],
    )


def _refusal(module: torch.nn.Module, bound: FeedForward) -> str | None:
    """Why the parts of `module` cannot be computed without being called, or None."""
    act = None if bound.act is None else getattr(module, bound.act)
    if bound.activation is None or (act is not None and kind(act) is not bound.act_type):
        return f"its activation {type(act).__name__} is none of {sorted(ACTIVATIONS)}"
    parts = {name: module._modules[name] for name in bound.layers}
    if not all(map(sizes, parts.values())):
        strange = next(name for name, part in parts.items() if not sizes(part))
        return f"{strange} is a {type(parts[strange]).__name__} that must be called itself"
    if isinstance(act, torch.nn.Module):
        parts[str(bound.act)] = act
    for name, part in parts.items():
        assert part is not None
        if not is_plain(part, type(part)):
            return (
                f"{name} is a {type(part).__name__} that must be called itself: "
                "it has hooks, an adapter or a weight of another kind"
            )
    return None


def _drops(module: torch.nn.Module, names: tuple[str, ...]) -> bool:
    dropouts: list[Any] = [module._modules[name] for name in names]
    return any(dropout.training and dropout.p for dropout in dropouts)


def _misplaced(module: torch.nn.Module, bound: FeedForward, draw: Draw) -> str | None:
    """Why the dropout is not where `bound` says, from a run in which it is watched."""
    if bound.dropout is None:
        return None
    seen: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    dropout, fc2 = module._modules[bound.dropout], module._modules[bound.fc2]
    assert dropout is not None and fc2 is not None
    with (
        dropout.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        fc2.register_forward_hook(lambda _, args, out: last.append(out)),
    ):
        module(draw.normal(2, 7, sizes(module._modules[bound.fc1])[0]))
    if len(seen) != 1 or len(last) != 1 or seen[0] is not last[0]:
        return f"{bound.dropout} drops something else than the output"
    return None


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    yield from map(recogniser, _feed_forwards(module))


def _feed_forwards(module: torch.nn.Module) -> Iterator[FeedForward]:
    if any(p is not None for p in (*module._parameters.values(), *module._buffers.values())):
        return
    children = {n: c for n, c in module._modules.items() if c is not None}
    layers = {n: c for n, c in children.items() if sizes(c)}
    if len(layers) not in (2, 3) or len(children) > 7:
        return
    dropouts = tuple(n for n, c in children.items() if isinstance(c, torch.nn.Dropout))
    rest = [n for n in children if n not in layers and n not in dropouts]
    acts = [*rest, *(n for n, v in vars(module).items() if _is_function(v))]
    if len(acts) > 1:
        return
    act = acts[0] if acts else None
    act_type = None if act is None else kind(getattr(module, act))
    known: list[str | None] = [*ACTIVATIONS]
    if act is not None:
        known = [*activations(getattr(module, act))] or [None]
    if len({type(layer).__name__ for layer in layers.values()}) > 1:
        return
    layout = "conv1d" if type(next(iter(layers.values()))).__name__ == "Conv1D" else "linear"
    if len(layers) == 3 and act is None and len({sizes(c) for c in layers.values()}) == 1:
        return  # q, k and v
    for order, activation in itertools.product(_orders(layers), known):
        for dropout in (*dropouts, None):
            inside = tuple(n for n in dropouts if n != dropout)
            yield FeedForward(*order, layout, activation, act, act_type, dropout, inside)


def _orders(
    layers: dict[str, torch.nn.Module],
) -> Iterator[tuple[str | None, str, str, str | None]]:
    """(gate, fc1, fc2, halves), wherever the sizes chain."""
    of = {name: sizes(layer) for name, layer in layers.items()}
    for *gates, fc1, fc2 in itertools.permutations(layers):
        hidden = of[fc2][0]
        if of[fc1][1] == hidden and all(of[gate] == of[fc1] for gate in gates):
            yield gates[0] if gates else None, fc1, fc2, None
        if of[fc1][1] == 2 * hidden and not gates:
            yield from ((None, fc1, fc2, halves) for halves in HALVES)


def sizes(layer: torch.nn.Module | None) -> tuple[int, ...]:
    """(in_features, out_features) of a linear layer, () of anything else."""
    if layer is None:
        return ()
    cls = getattr(layer, "_fastattn_original", type(layer))
    weight = layer._parameters.get("weight")
    if weight is None or weight.dim() != 2 or layer._modules:
        return ()
    if cls is torch.nn.Linear:
        return weight.shape[1], weight.shape[0]
    if cls.__name__ == "Conv1D" and tuple(weight.shape) == (
        getattr(layer, "nx", None),
        getattr(layer, "nf", None),
    ):
        return tuple(weight.shape)
    return ()


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (type, torch.nn.Module))


def kind(act: Any) -> Any:
    """What an activation has to be still, for what was proven: the function, else the class."""
    return act if isinstance(act, (FunctionType, BuiltinFunctionType)) else type(act)


def activations(act: Any) -> list[str]:
    """The activation of `ffn` that has the values of `act`, if there is one."""
    x = torch.linspace(-40, 40, 321)
    try:
        with torch.inference_mode(False), torch.no_grad():
            y = act(x)
        found = isinstance(y, torch.Tensor) and y.shape == x.shape
    except Exception:
        return []
    return [n for n, f in ACTIVATIONS.items() if found and torch.allclose(y, f(x), atol=1e-6)]
