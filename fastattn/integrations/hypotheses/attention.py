"""Attention whose forward calls `F.scaled_dot_product_attention` itself: timm, nanoGPT, plain code.

Such a forward runs unchanged but for this one function: with globals in which `F`, `torch` and
`scaled_dot_product_attention` are ours (hypotheses/rebinding.py), and the function of a rotary
embedding, if it names one (hypotheses/rotation.py).

In diffusers an object that the module keeps, its processor, makes the call. Its forward then runs
on a view of the module, in which this object is of a class made in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fastattn.backends import explanation_of
from fastattn.integrations import calls
from fastattn.integrations.hypotheses import rotation
from fastattn.integrations.hypotheses.rebinding import innermost, rebound
from fastattn.integrations.hypotheses.rotation import Rotation
from fastattn.integrations.hypotheses.view import View
from fastattn.integrations.proof import Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.integrations.sdpa import fused_or_original
from fastattn.ops.attention import attention
from fastattn.ops.rotary import rotary

CALLED = "scaled_dot_product_attention"


class SDPASwap(torch.nn.Module):
    """Runs the original's forward with our function for F.scaled_dot_product_attention."""

    _fastattn_bound: ClassVar[Rotation | None]

    @staticmethod
    def recogniser(bound: Rotation | None) -> Recogniser:
        return _recogniser(SDPASwap, bound)

    def __init_subclass__(cls) -> None:
        if (original := vars(cls).get("_fastattn_original")) is None:  # a tool's subclass
            return
        ours, bound = _replaced(original.forward), cls._fastattn_bound
        if bound is not None:
            function = innermost(original.forward)
            assert function is not None
            ours[bound.name] = rotation.ours(bound, function.__globals__[bound.name])
        cls.forward = rebound(original.forward, ours)


class ProcessorSwap(torch.nn.Module):
    """Runs the original's forward with our function in the call of an object that it keeps.

    Compiled, it runs the original.
    """

    _fastattn_bound: ClassVar[str]  # the name of that object
    _fastattn_forward: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        if (original := vars(cls).get("_fastattn_original")) is not None:  # not a tool's subclass
            # By a name of its own: torch.compile takes diffusers' class itself for an operator.
            cls._fastattn_forward = staticmethod(original.forward)

    @staticmethod
    def recogniser(bound: str) -> Recogniser:
        return _recogniser(ProcessorSwap, bound)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        processor: Any = vars(self).get(self._fastattn_bound)
        # torch.compile cannot read the signature of an object that is made while it traces, which
        # diffusers asks for.
        if torch.compiler.is_compiling() or not _known(type(processor)):  # another one by now
            return super().forward(*args, **kwargs)
        made = _processors[type(processor)]
        ours = made.__new__(made)
        ours.__dict__ = processor.__dict__
        view = View(self, {self._fastattn_bound: ours})
        return self._fastattn_forward(view, *args, **kwargs)


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    forward = type(module).forward
    if _calls(forward):
        function = innermost(forward)
        assert function is not None
        for found in (*rotation.rotations(function), None):
            yield _recogniser(SDPASwap, found)
    elif isinstance(forward, FunctionType):
        for name in forward.__code__.co_names:
            if _known(type(vars(module).get(name))):
                yield _recogniser(ProcessorSwap, name)


def _calls(function: Any) -> bool:
    original = innermost(function)
    return original is not None and CALLED in original.__code__.co_names


_processors: dict[type, Any] = {}  # with our function in their call


def _known(cls: Any) -> bool:
    """Whether instances of a class call torch's function; a class that calls ours is made then."""
    if cls not in _processors and _calls(call := vars(cls).get("__call__")):
        _processors[cls] = type(cls.__name__, (cls,), {"__call__": rebound(call, _replaced(call))})
    return cls in _processors


def _replaced(function: Any) -> dict[str, Any]:
    """The names in a function's globals through which it calls torch's, with ours."""
    original = innermost(function)
    assert original is not None
    ours: dict[str, Any] = {}
    for name in original.__code__.co_names:
        value = original.__globals__.get(name)
        if value is F.scaled_dot_product_attention:
            ours[name] = fused_or_original
        elif value is F:
            ours[name] = _functional()
        elif value is torch:
            ours[name] = _torch()
        elif value is torch.nn:
            ours[name] = _torch().nn
    return ours


def _like(module: ModuleType, **changed: Any) -> ModuleType:
    """A module with the same names, but for some; those that come later are looked up."""
    made = ModuleType(module.__name__, module.__doc__)
    made.__dict__.update({**vars(module), "__getattr__": functools.partial(getattr, module)})
    made.__dict__.update(changed)
    return made


@functools.cache
def _functional() -> ModuleType:
    return _like(F, **{CALLED: fused_or_original})


@functools.cache
def _torch() -> Any:
    return _like(torch, nn=_like(torch.nn, functional=_functional()))


def _backend(bound: str | Rotation | None, probe: Probe) -> str | None:
    x = next(value for value in probe.kwargs.values() if isinstance(value, torch.Tensor))
    q = x.new_empty(calls.BATCH, calls.SEQLEN, 1, 64, requires_grad=True)
    of_attention = explanation_of(attention, q, q, q).backend
    if not isinstance(bound, Rotation):
        return of_attention
    cos = x.new_empty(calls.SEQLEN, 64)
    options = {"interleaved": bound.interleaved}
    return f"{of_attention}, rotary {explanation_of(rotary, q, q, cos, cos, **options).backend}"


@functools.cache
def _recogniser(mixin: type, bound: str | Rotation | None) -> Recogniser:
    rotated = f", with {bound}" if isinstance(bound, Rotation) else ""
    return Recogniser(
        words=f"attention by F.scaled_dot_product_attention{rotated}",
        mixin=mixin,
        probes=lambda module, draw: next(calls.guesses(module, draw)),
        guesses=calls.guesses,
        backend=lambda module, probe: _backend(bound, probe),
        bound=bound,
        proving=rotation.every_size,
    )
