"""Attention whose forward calls `F.scaled_dot_product_attention` itself: timm, nanoGPT, plain code.

Such a forward runs unchanged but for this one function. A new forward is made of its code object,
with globals in which `F`, `torch` and `scaled_dot_product_attention` are ours. Neither torch nor
the file of the class is touched, and other classes in that file keep torch's function.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from fastattn.backends import explanation_of
from fastattn.integrations import calls
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


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    forward = type(module).forward
    if isinstance(forward, FunctionType) and CALLED in forward.__code__.co_names:
        yield ATTENTION


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


ATTENTION = Recogniser(
    words="attention by F.scaled_dot_product_attention",
    mixin=SDPASwap,
    probes=lambda module, draw: next(calls.guesses(module, draw)),
    guesses=calls.guesses,
    backend=_backend,
)
