"""Attention whose forward calls `F.scaled_dot_product_attention` itself: timm, nanoGPT, plain code.

Such a forward runs unchanged but for this one function. A new forward is made of its code object,
with globals in which `F`, `torch` and `scaled_dot_product_attention` are ours. Neither torch nor
the file of the class is touched, and other classes in that file keep torch's function.

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
from fastattn.integrations.hypotheses.view import View
from fastattn.integrations.proof import Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.integrations.sdpa import fused_or_original
from fastattn.ops.attention import attention

CALLED = "scaled_dot_product_attention"


class SDPASwap(torch.nn.Module):
    """Runs the original's forward with our function for F.scaled_dot_product_attention."""

    @staticmethod
    def recogniser(bound: None) -> Recogniser:
        return ATTENTION

    def __init_subclass__(cls) -> None:
        if (original := vars(cls).get("_fastattn_original")) is not None:  # not a tool's subclass
            cls.forward = _rebound(original.forward)


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
        yield ATTENTION
    elif isinstance(forward, FunctionType):
        for name in forward.__code__.co_names:
            if _known(type(vars(module).get(name))):
                yield _recogniser(ProcessorSwap, name)


def _calls(function: Any) -> bool:
    return isinstance(function, FunctionType) and CALLED in function.__code__.co_names


_processors: dict[type, Any] = {}  # with our function in their call


def _known(cls: Any) -> bool:
    """Whether instances of a class call torch's function; a class that calls ours is made then."""
    if cls not in _processors and _calls(call := vars(cls).get("__call__")):
        _processors[cls] = type(cls.__name__, (cls,), {"__call__": _rebound(call)})
    return cls in _processors


def _rebound(function: FunctionType) -> FunctionType:
    """`function` with other globals."""
    names = {**function.__globals__}
    for name in function.__code__.co_names:
        value = names.get(name)
        if value is F.scaled_dot_product_attention:
            names[name] = fused_or_original
        elif value is F:
            names[name] = _functional()
        elif value is torch:
            names[name] = _torch()
        elif value is torch.nn:
            names[name] = _torch().nn
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    made = FunctionType(code, names, function.__name__, defaults, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


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


def _backend(module: torch.nn.Module, probe: Probe) -> str | None:
    x = next(value for value in probe.kwargs.values() if isinstance(value, torch.Tensor))
    q = x.new_empty(calls.BATCH, calls.SEQLEN, 1, 64, requires_grad=True)
    return explanation_of(attention, q, q, q).backend


def _recogniser(mixin: type, bound: str | None) -> Recogniser:
    return Recogniser(
        words="attention by F.scaled_dot_product_attention",
        mixin=mixin,
        probes=lambda module, draw: next(calls.guesses(module, draw)),
        guesses=calls.guesses,
        backend=_backend,
        bound=bound,
    )


ATTENTION = _recogniser(SDPASwap, None)
