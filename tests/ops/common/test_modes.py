"""What calls are recorded, and whose values may be read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastattn.ops.common import modes

Ask = Callable[[torch.Tensor], torch.Tensor]


def _fake(ask: Ask, x: torch.Tensor) -> object:
    mode = FakeTensorMode()
    with mode:
        return ask(mode.from_tensor(x))


def _counted(ask: Ask, x: torch.Tensor) -> object:
    with FlopCounterMode(display=False):
        return ask(x)


RECORDERS: dict[str, Callable[[Ask, torch.Tensor], object]] = {
    "compile": lambda ask, x: torch.compile(ask, backend="eager", fullgraph=True)(x),
    "jit.trace": lambda ask, x: torch.jit.trace(ask, (x,), check_trace=False),
    "make_fx": lambda ask, x: make_fx(ask)(x),
    "make_fx, symbolic": lambda ask, x: make_fx(ask, tracing_mode="symbolic")(x),
    "fake": _fake,
}
OTHERS: dict[str, Callable[[Ask, torch.Tensor], object]] = {
    "nothing": lambda ask, x: ask(x),
    "no_grad": lambda ask, x: torch.no_grad()(ask)(x),
    "autocast": lambda ask, x: torch.autocast("cpu")(ask)(x),
    "grad": lambda ask, x: torch.func.grad(lambda w: (w * ask(x)).sum())(torch.ones(())),
    "counter": _counted,
}


@pytest.mark.parametrize("way", [*RECORDERS, *OTHERS])
def test_recorded_and_readable(way: str) -> None:
    torch._dynamo.reset()
    answers = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        answers.append((modes.recorded(), modes.readable(x)))
        return x + 1

    (RECORDERS | OTHERS)[way](ask, torch.arange(3))
    assert set(answers) == {(True, False) if way in RECORDERS else (False, True)}
    assert not modes.recorded()


def test_values_of_wrapped_and_empty_tensors() -> None:
    answers = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        answers.append(modes.readable(x))
        return x + 1

    torch.vmap(ask)(torch.arange(3))
    torch.vmap(torch.func.grad(lambda x: ask(x).sum()))(torch.ones(3))
    ask(torch.ones(2, device="meta"))
    ask(FakeTensorMode().from_tensor(torch.ones(2)))
    assert answers == [False, False, False, False]
    torch.func.jvp(ask, (torch.ones(2),), (torch.ones(2),))
    assert answers.pop()
    assert modes.readable(torch.nn.Parameter(torch.ones(2)))
