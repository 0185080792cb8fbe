"""Rotary embedding in an attention of transformers, by the function that its forward calls.

    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

A forward that names such a function of its module runs unchanged but for this one name
(hypotheses/rebinding.py, hypotheses/rotation.py). The attention itself goes to ours as well
(huggingface/swap.py).

Where children of the module are norms of the heads of q and k, and the results of these are what is
rotated, norm and rotation are one call. The forward runs on a view of the module then, in which
such a child leaves its norm to the rotation (hypotheses/deferred_norm.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastattn.backends import explanation_of
from fastattn.integrations import calls
from fastattn.integrations.huggingface import swap
from fastattn.integrations.huggingface.swap import AttentionSwap
from fastattn.integrations.hypotheses import deferred_norm, rotation
from fastattn.integrations.hypotheses.norm import Norm, norms_of
from fastattn.integrations.hypotheses.rebinding import innermost, rebound
from fastattn.integrations.hypotheses.rotation import Rotation
from fastattn.integrations.hypotheses.view import View
from fastattn.integrations.proof import Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.ops.common import modes
from fastattn.ops.rotary import rotary


class RotaryAttentionSwap(AttentionSwap):
    """`AttentionSwap`, and its original's forward with our function for the rotary embedding."""

    _fastattn_bound: ClassVar[tuple[Any, ...]]  # (replaced, rotation)

    @staticmethod
    def recogniser(bound: Any) -> Recogniser:
        return recogniser(*bound)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (original := vars(cls).get("_fastattn_original")) is not None:  # not a tool's subclass
            cls.forward = _rotating(original.forward, cls._fastattn_bound[1], rotation.ours)


def _rotating(forward: Any, bound: Rotation, make: Callable[[Rotation, Any], Any]) -> Any:
    """`forward` with what is made for the rotation of its function."""
    function = innermost(forward)
    assert function is not None
    return rebound(forward, {bound.name: make(bound, function.__globals__[bound.name])})


@dataclass(frozen=True)
class HeadNorms:
    """The children that are norms of heads.

    Attributes:
        names: of those children, all of them of the class `cls`.
    """

    norm: Norm
    cls: type[torch.nn.Module]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.norm} of {', '.join(self.names)}"


class NormedRotaryAttentionSwap(RotaryAttentionSwap):
    """`RotaryAttentionSwap` that norms the heads of q and k in the same call as it rotates them.

    Compiled, it leaves the norms where they are.
    """

    _fastattn_bound: ClassVar[tuple[Any, ...]]  # (replaced, rotation, norms)
    _fastattn_rotating: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (original := vars(cls).get("_fastattn_original")) is None:  # a tool's subclass
            return
        cls._fastattn_rotating = staticmethod(cls.forward)

        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or modes.transformed():
                return self._fastattn_rotating(self, *args, **kwargs)
            view = View(self, _deferring(self, self._fastattn_bound[2]))
            return self._fastattn_rotating(view, *args, **kwargs)

        cls.forward = forward


def _deferring(module: Any, norms: HeadNorms) -> dict[str, Callable[[Any], Any]]:
    """What stands for the norms in the view of a module."""

    def standing_for(child: torch.nn.Module) -> Callable[[Any], Any]:
        def norm(x: Any) -> Any:
            if isinstance(x, torch.Tensor) and rotation.is_small(x):
                return child(x)
            return deferred_norm.later(norms.norm, norms.cls, child, x)

        return norm

    return {name: standing_for(module._modules[name]) for name in norms.names}


@functools.cache
def recogniser(replaced: str, bound: Rotation, norms: HeadNorms | None = None) -> Recogniser:
    of_attention = swap.RECOGNISERS[replaced]
    assert of_attention.guesses is not None
    guesses = of_attention.guesses

    def backend(module: torch.nn.Module, probe: Probe) -> str | None:
        q = swap.example(module, probe)
        cos = q.new_empty(*q.shape[:2], q.shape[3])
        options: dict[str, Any] = {"interleaved": bound.interleaved}
        what = "rotary"
        if norms is not None:
            weight, settings = norms.norm.of_heads(module._modules[norms.names[0]])
            options |= {"q_weight": weight, **settings}
            what = "norms of heads with rotary"
        of_rotary = explanation_of(rotary, q, q, cos, cos, **options).backend
        return f"{of_attention.backend(module, probe)}, {what} {of_rotary}"

    made = dataclasses.replace(
        of_attention,
        words=f"{of_attention.words}, with {bound}",
        mixin=RotaryAttentionSwap,
        backend=backend,
        bound=(replaced, bound),
        proving=rotation.every_size,
    )
    if norms is None:
        return made
    return dataclasses.replace(
        made,
        words=f"{made.words} after {norms}",
        mixin=NormedRotaryAttentionSwap,
        bound=(replaced, bound, norms),
        premise=lambda module, draw: _not_rotated(module, bound, norms, guesses(module, draw)),
        fused=lambda module: [module._modules[name] for name in norms.names],
    )


def _not_rotated(
    module: torch.nn.Module, bound: Rotation, norms: HeadNorms, guesses: Any
) -> str | None:
    """Why the norms are not of what is rotated, from a run in which both are watched."""
    normed: list[torch.Tensor] = []
    rotated: list[torch.Tensor] = []

    def watching(_: Rotation, original: Any) -> Any:
        def apply(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            rotated.extend((q, k))
            return original(q, k, *args, **kwargs)

        return functools.wraps(original)(apply)

    forward = _rotating(type(module).forward, bound, watching)
    with contextlib.ExitStack() as hooks:
        for name in norms.names:
            norm: Any = module._modules[name]
            hooks.enter_context(norm.register_forward_hook(lambda _, args, out: normed.append(out)))
        for probe, *_ in guesses:
            normed.clear()
            rotated.clear()
            with contextlib.suppress(Exception):
                forward(module, *probe.args, **probe.kwargs)
                break
    places = {(x.data_ptr(), x.numel()) for x in rotated}
    if len(normed) == len(norms.names) and all((x.data_ptr(), x.numel()) in places for x in normed):
        return None
    return f"{norms} are not of what is rotated"


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    dispatching = next(swap.of(module), None)
    forward = innermost(type(module).forward)
    if dispatching is None or forward is None:
        return
    replaced: Any = dispatching.bound
    for found in rotation.rotations(forward):
        for norms in _head_norms(module):
            yield recogniser(*replaced, found, norms)
        yield recogniser(*replaced, found)


def _head_norms(module: torch.nn.Module) -> Iterator[HeadNorms]:
    head_dim = None
    with contextlib.suppress(Exception):  # nothing tells it
        head_dim = calls.head_dim(module)
    names: dict[tuple[Norm, Any], list[str]] = {}
    for name, child in module.named_children():
        cls = getattr(type(child), "_fastattn_original", type(child))
        for norm in norms_of(child):
            weight = None if norm.centered or norm.weight is None else getattr(child, norm.weight)
            if weight is not None and len(weight) == head_dim:
                names.setdefault((norm, cls), []).append(name)
    for (norm, cls), of_heads in names.items():
        yield HeadNorms(norm, cls, tuple(of_heads))
