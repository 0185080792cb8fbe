"""An MLP that is no module of its own, but is written into the forward of a larger one.

    fc2(act(fc1(x)))        in a layer (BART, OPT, ALBERT), or with a residual (BLOOM)
    fc1 and act in one child, fc2 in another one (BERT's intermediate and output)

Such a forward runs unchanged on a view of the module in which fc1 and act do nothing and fc2 is the
whole MLP. The module itself keeps its parts; only its own forward sees them so. Where another thing
is done with a part, or between them, the proof says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch

from fastattn.backends import explanation_of
from fastattn.integrations import calls
from fastattn.integrations.hypotheses.feed_forward import activations, kind, sizes
from fastattn.integrations.hypotheses.view import View
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.nn.plain import is_plain
from fastattn.ops.ffn import ffn

Path = tuple[str, ...]  # the names on the way from the module: at most one child lies between


@dataclass(frozen=True)
class Inner:
    """Where a module keeps the parts of its MLP.

    Attributes:
        activation, layout: as `fastattn.ffn` has them.
        act_type: the class of what is at `act`, or the function.
        dropped: whether elements of the hidden layer are dropped in training.
    """

    fc1: Path
    act: Path
    fc2: Path
    activation: str
    layout: str
    act_type: Any
    dropped: bool

    def __str__(self) -> str:
        return f"MLP of {'.'.join(self.fc1)}, {self.activation}, {'.'.join(self.fc2)} inside"

    def arguments(self, module: torch.nn.Module, x: torch.Tensor) -> dict[str, Any]:
        """Those of `ffn`."""
        fc1, fc2 = _at(module, self.fc1), _at(module, self.fc2)
        return {
            "x": x, "w1": fc1.weight, "b1": fc1.bias, "w2": fc2.weight, "b2": fc2.bias,
            "activation": self.activation, "layout": self.layout,
        }  # fmt: skip

    def view(self, module: torch.nn.Module) -> View:
        instead: dict[str, Any] = {}
        for path, function in (
            (self.fc1, _same),
            (self.act, _same),
            (self.fc2, lambda x: ffn(**self.arguments(module, x))),
        ):
            within = instead
            for name in path[:-1]:
                within = within.setdefault(name, {})
            within[path[-1]] = function
        return View(module, instead)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _at(module: Any, path: Path) -> Any:
    """The part there, None if it is gone."""
    for name in path:
        module = getattr(module, name, None)
    return module


class InnerFeedForwardSwap(torch.nn.Module):
    """Runs the MLP inside of a module on `fastattn.ffn`, and leaves its forward to it."""

    _fastattn_original: ClassVar[Any]
    _fastattn_bound: ClassVar[Inner]

    @staticmethod
    def recogniser(bound: Inner) -> Recogniser:
        return recogniser(bound)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._fastattn_bound
        # At every call, because hooks, adapters and parametrisations come and go.
        dropping = bound.dropped and self.training and _may_drop(self, bound)
        if dropping or _refusal(self, bound):
            return super().forward(*args, **kwargs)
        return self._fastattn_original.forward(bound.view(self), *args, **kwargs)


def recogniser(bound: Inner) -> Recogniser:
    def backend(module: torch.nn.Module, probe: Probe) -> str | None:
        x = next(value for value in probe.kwargs.values() if isinstance(value, torch.Tensor))
        return explanation_of(ffn, **bound.arguments(module, x)).backend

    def guesses(module: torch.nn.Module, draw: Draw) -> Iterator[Sequence[Probe]]:
        width, _ = sizes(_at(module, bound.fc1))
        for probes in calls.guesses(module, draw, width=width):
            yield probes[:1]  # masks are no matter of it

    return Recogniser(
        words=str(bound),
        mixin=InnerFeedForwardSwap,
        probes=lambda module, draw: next(guesses(module, draw)),
        guesses=guesses,
        backend=backend,
        refusal=lambda module: _refusal(module, bound),
        premise=lambda module, draw: (
            None if bound.dropped else _drops(module, bound, guesses(module, draw))
        ),
        bound=bound,
        fused=lambda module: [_at(module, path) for path in (bound.fc1, bound.act, bound.fc2)],
        whole=False,
    )


def _refusal(module: torch.nn.Module, bound: Inner) -> str | None:
    """Why the parts of `module` cannot be computed without being called, or None."""
    if kind(act := _at(module, bound.act)) is not bound.act_type:
        return f"its activation is another by now, a {type(act).__name__}"
    called = [bound.fc1, bound.act, bound.fc2]
    called += [path[:-1] for path in called if len(path) > 1]
    for path in called:
        part = _at(module, path)
        plain = not isinstance(part, torch.nn.Module) or is_plain(part, type(part))
        if not plain or (path in (bound.fc1, bound.fc2) and not sizes(part)):
            return (
                f"{'.'.join(path)} is a {type(part).__name__} that must be called itself: "
                "it has hooks, an adapter or a weight of another kind"
            )
    return None


def _may_drop(module: torch.nn.Module, bound: Inner) -> bool:
    """Whether the module, or the one with fc1 or fc2 in it, has any dropout at present."""
    for holder in {module, _at(module, bound.fc1[:-1]), _at(module, bound.fc2[:-1])}:
        if holder is None:
            return True
        if any("dropout" in name and value for name, value in vars(holder).items()):
            return True
        if any(isinstance(m, torch.nn.Dropout) and m.p for m in holder.children()):
            return True
    return False


def _drops(module: torch.nn.Module, bound: Inner, guesses: Iterator[Sequence[Probe]]) -> str | None:
    """Whether something is done between the activation and fc2 in training, by watching a run."""
    zeroed = [
        (part.__dict__, name)
        for part in module.modules()
        for name, value in part.__dict__.items()
        if type(value) in (int, float) and value == 0
        and ("dropout" in name or isinstance(part, torch.nn.Dropout))
    ]  # fmt: skip
    hidden: list[torch.Tensor] = []
    fc1, act, fc2 = (_at(module, path) for path in (bound.fc1, bound.act, bound.fc2))
    try:
        for attributes, name in zeroed:
            attributes[name] = 0.5
        module.train()
        with (
            fc1.register_forward_hook(lambda _, args, out: hidden.append(act(out))),
            fc2.register_forward_pre_hook(lambda _, args: hidden.append(args[0])),
        ):
            for (probe,) in guesses:
                hidden.clear()
                with contextlib.suppress(Exception):
                    module(*probe.args, **probe.kwargs)
                    if len(hidden) == 2 and torch.equal(*hidden):
                        return None
                    break
        return "elements of the hidden layer are dropped"
    finally:
        for attributes, name in zeroed:
            attributes[name] = 0.0


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    if isinstance(type(module).forward, FunctionType) and not _of_torch(type(module)):
        yield from map(recogniser, _inner(module))


def _of_torch(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch"


def _inner(module: torch.nn.Module) -> Iterator[Inner]:
    layers = {path: layer for path, layer in _near(module) if sizes(layer)}
    for fc1, first in layers.items():
        for fc2, second in layers.items():
            inputs, hidden = sizes(first)
            if sizes(second) != (hidden, inputs) or hidden <= inputs:
                continue
            if len(fc1) != len(fc2) or type(first) is not type(second):
                continue
            if len(fc1) > 1 and fc1[0] == fc2[0]:
                continue  # a module of their own
            layout = "linear" if isinstance(first, torch.nn.Linear) else "conv1d"
            for name, act, names in _activations(_at(module, fc1[:-1])):
                for activation in names:
                    for dropped in (False, True):
                        path = (*fc1[:-1], name)
                        yield Inner(fc1, path, fc2, activation, layout, kind(act), dropped)


def _near(module: torch.nn.Module) -> Iterator[tuple[Path, torch.nn.Module]]:
    """Children and their children, and where they are."""
    for name, child in module.named_children():
        yield (name,), child
        yield from (((name, inner), part) for inner, part in child.named_children())


def _activations(module: torch.nn.Module) -> Iterator[tuple[str, Callable[..., Any], list[str]]]:
    """Attributes that are activations of `ffn`, and which."""
    for name, value in (*module._modules.items(), *vars(module).items()):
        if isinstance(value, torch.nn.Module):
            if value._modules or value._parameters or value._buffers:
                continue
        elif name.startswith("_") or not callable(value) or isinstance(value, type):
            continue
        if names := activations(value):
            yield name, value, names
