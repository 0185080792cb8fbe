"""One way in which modules of a class may be run on fastattn."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.integrations.proof import Draw, Probe


def _nothing(*_: Any) -> None:
    return None


def _none(_: Any) -> tuple[()]:
    return ()


def _itself(module: torch.nn.Module) -> torch.nn.Module:
    return module


@dataclass(frozen=True)
class Recogniser:
    """How a module is brought onto fastattn, to be proven before it is.

    Attributes:
        words: what the module is taken for, for reports.
        mixin: has our `forward`. Where it is no subclass of the original class, the new class
            inherits from both, and `super().forward` in it is the original's.
        probes: the calls with which the two are compared, for a copy of an instance.
        backend: the name of the fastattn backend that runs the first probe.
        refusal: the reason why an instance cannot run on `mixin` at present, or None. Asked of
            originals and of swapped instances.
        premise: the reason why it cannot be what it is taken for, or None; asked of a copy that may
            be run.
        specimen: what is proven in place of a module: itself, or a smaller one of its kind.
        bound: where a module whose class is not known keeps its parts; `mixin` reads it from its
            class, as `_fastattn_bound`, and `mixin.recogniser(bound)` is this object again. None
            for a mixin that needs nothing of the kind.
        guesses: several such calls for a class whose arguments nobody states. The proof takes the
            first that the original runs; `probes` is the first of all.
        outputs: how many of the results, from the first, have to be equal; None for all. The rest
            is for those who ask for it, and they get the original's.
        fused: the modules that it computes without calling them; by default none.
        whole: whether all its children are part of it. If not, those that are not in `fused` are
            examined on their own, and its class keeps the name by which tools look for layers.
        keeps_buffers: whether the proof keeps the values of buffers, as of a mask; weights are
            random.
        proving: a context in which ours is not left out for the proof's calls being small.
    """

    words: str
    mixin: type
    probes: Callable[[torch.nn.Module, Draw], Sequence[Probe]]
    backend: Callable[[torch.nn.Module, Probe], str | None]
    refusal: Callable[[torch.nn.Module], str | None] = _nothing
    premise: Callable[[torch.nn.Module, Draw], str | None] = _nothing
    specimen: Callable[[torch.nn.Module], torch.nn.Module] = _itself
    bound: Hashable = None
    guesses: Callable[[torch.nn.Module, Draw], Iterator[Sequence[Probe]]] | None = None
    outputs: int | None = None
    fused: Callable[[torch.nn.Module], Iterable[Any]] = _none
    whole: bool = True
    keeps_buffers: bool = False
    proving: Callable[[], AbstractContextManager[None]] = nullcontext
