"""Attention modules of transformers, one by one, on our implementation.

The hypothesis: a class whose forward dispatches through transformers' `AttentionInterface` leaves
the attention itself to a function that its config names, so that it runs on another function
unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface

from fastattn.backends import explanation_of
from fastattn.integrations import calls
from fastattn.integrations.huggingface import dispatch
from fastattn.integrations.huggingface.dispatch import NAME, NAME_OR_EAGER
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.ops.attention import attention

# What is registered in place of an implementation: it takes the same masks and gives the same.
REPLACED_BY = {"sdpa": NAME, "eager": NAME_OR_EAGER}


class _FastattnConfig:
    """A live view of a model's config that names our attention implementation."""

    def __init__(self, config: Any, name: str) -> None:
        self.__dict__["_config"] = config  # torch.compile of torch 2.11 knows no `update`
        self.__dict__["_attn_implementation"] = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _FastattnConfig, (self.__dict__["_config"], self.__dict__["_attn_implementation"])


class AttentionSwap(torch.nn.Module):
    """Gives an attention module of transformers our implementation, and leaves its forward to it.

    Such a module asks `self.config._attn_implementation` which function to call. The config itself
    is not the place to change: the whole model shares it (often several models do), it takes part
    in comparisons, and modules could not be left alone one by one. So the class answers `config`
    with a view that differs in this one word.

    The view stands in for one implementation only: "sdpa" where the family has it, else "eager".
    After `model.set_attn_implementation(another)` the module does what it is told and runs the
    original.
    """

    # First the implementation whose place ours takes; what follows is a subclass's.
    _fastattn_bound: ClassVar[tuple[Any, ...]]
    _fastattn_eager: ClassVar[Any]  # the function that the original runs on "eager"

    packed_by_mask_alone = True  # as "sdpa": see `attention_forward`

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (original := vars(cls).get("_fastattn_original")) is not None:  # not a tool's subclass
            eager: Any = _eager_of(original)
            cls._fastattn_eager = staticmethod(eager)

    @staticmethod
    def recogniser(bound: Any) -> Recogniser:
        return RECOGNISERS[bound[0]]

    # The instance's __dict__ by a second name: to the torch.compile of torch 2.11 an item of
    # `self.__dict__` is the attribute of that name, so that the property would ask itself.
    _attributes = torch.nn.Module.__dict__["__dict__"]

    @property
    def config(self) -> Any:
        config, replaced = self._attributes["config"], self._fastattn_bound[0]
        if config._attn_implementation != replaced:
            return config
        return _FastattnConfig(config, REPLACED_BY[replaced])

    @config.setter
    def config(self, value: Any) -> None:
        self._attributes["config"] = value


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    config = module.__dict__.get("config")
    if hasattr(config, "_attn_implementation") and _dispatches(type(module)):
        yield RECOGNISERS[dispatch.replaceable(config) or "sdpa"]


def _dispatches(cls: type) -> bool:
    """Whether the forward of a class names an `AttentionInterface`."""
    return any(isinstance(value, AttentionInterface) for value in _globals(cls).values())


def _globals(cls: type) -> dict[str, Any]:
    """The globals that the forward of a class names."""
    original: Any = getattr(cls, "_fastattn_original", cls)
    forward: Any = inspect.unwrap(original.forward)
    code = getattr(forward, "__code__", None)
    names = () if code is None else code.co_names
    return {name: forward.__globals__.get(name) for name in names}


def _eager_of(cls: type) -> Callable[..., Any] | None:
    """The function that the forward of a class hands to `get_interface` for "eager"."""
    return next(
        (f for n, f in _globals(cls).items() if "eager" in n and isinstance(f, FunctionType)), None
    )


def _refusal(module: torch.nn.Module, replaced: str) -> str | None:
    config: Any = module.__dict__["config"]
    implementation = config._attn_implementation
    if implementation == NAME:
        return f'its config already says attn_implementation="{NAME}"'
    if dispatch.replaceable(config) is None:
        return (
            'its family has no implementation but "eager", and may count on its weights: '
            f'load it with attn_implementation="{NAME}" where it does not'
        )
    if implementation != replaced:
        return (
            f"its config says attn_implementation={implementation!r}, whose masks or results "
            f'differ: model.set_attn_implementation("{replaced}") before'
        )
    if replaced == "eager" and _eager_of(type(module)) is None:
        return "its forward names no function that gives attention weights when they are asked for"
    return None


def example(module: Any, probe: Probe) -> torch.Tensor:
    """One head of q (batch, seqlen, 1, head_dim), without values."""
    x = next(v for v in probe.kwargs.values() if isinstance(v, torch.Tensor))
    shape = calls.BATCH, calls.SEQLEN, 1, calls.head_dim(module)
    return x.new_empty(shape, requires_grad=True)


def _backend(module: Any, probe: Probe) -> str | None:
    q = example(module, probe)
    causal = bool(getattr(module, "is_causal", True))
    return explanation_of(attention, q, q, q, causal=causal).backend


def _recogniser(replaced: str) -> Recogniser:
    def guesses(module: torch.nn.Module, draw: Draw) -> Iterator[Sequence[Probe]]:
        return calls.guesses(module, draw, additive=replaced == "eager")

    return Recogniser(
        words="attention that dispatches through transformers' AttentionInterface",
        mixin=AttentionSwap,
        probes=lambda module, draw: next(guesses(module, draw)),
        guesses=guesses,
        backend=_backend,
        refusal=lambda module: _refusal(module, replaced),
        bound=(replaced,),
        outputs=1,  # "eager" gives its weights too, whether or not anyone asks
    )


RECOGNISERS = {replaced: _recogniser(replaced) for replaced in REPLACED_BY}
