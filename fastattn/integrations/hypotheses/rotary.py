"""Rotary embedding in an attention of transformers, by the function that its forward calls.

    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

A forward that names such a function of its module runs unchanged but for this one name: a new
function is made of its code object, with globals in which the name is ours. Neither the module nor
the code of the class is touched, and other classes there keep the original. The attention itself
goes to ours as well (huggingface/swap.py).

The function is known by its first arguments, q, k, cos and sin, and by what it computes: it is
called on random heads and angles, and has to be one of the rotations that `fastattn.rotary` has.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, ClassVar

import torch

from fastattn import backends, rule
from fastattn.backends import explanation_of
from fastattn.integrations.huggingface import swap
from fastattn.integrations.huggingface.swap import AttentionSwap
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.ops.rotary import rotary

ARGUMENTS = ["q", "k", "cos", "sin"]
# Below so many elements of q the original function is as fast on a CPU, and has no call to prepare
# (AMD EPYC, one thread, torch 2.13, 2026-11-29).
LEAST_ON_CPU = 2**16
HEADS, KV_HEADS, HEAD_DIM, PART = 3, 2, 12, 4

Apply = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Rotation:
    """The rotation that a function is.

    Attributes:
        name: of the function, in the globals of the forward.
        interleaved: as `fastattn.rotary` has it.
        angles: the meaning of cos and sin (batch, seqlen, width): an angle for each "element" or
            each "pair" of a head, or of each element of which only the "first half" counts.
        partial: whether narrower cos and sin rotate a part of each head.
    """

    name: str
    interleaved: bool
    angles: str
    partial: bool = False

    def __str__(self) -> str:
        pairs = "interleaved pairs" if self.interleaved else "pairs of halves"
        return f"rotary embedding by {self.name} of {pairs}"

    def fits(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int
    ) -> bool:
        """Whether a call is one of those that were compared with the original."""
        if not all(isinstance(x, torch.Tensor) for x in (q, k, cos, sin)):
            return False
        if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and dim in (1, 2)):
            return False
        if not q.dtype == k.dtype == cos.dtype == sin.dtype or cos.shape != sin.shape:
            return False
        head_dim, width = q.shape[3], cos.shape[2] * (2 if self.angles == "pair" else 1)
        return width == head_dim or (self.partial and width < head_dim)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = cos.shape[-1]
        rotary_dim = 2 * width if self.angles == "pair" else width
        if self.angles == "first half":
            cos, sin = cos[..., : width // 2], sin[..., : width // 2]
        if dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = rotary(q, k, cos, sin, rotary_dim=rotary_dim, interleaved=self.interleaved)
        return (q.transpose(1, 2), k.transpose(1, 2)) if dim == 1 else (q, k)


def _ours(rotation: Rotation, original: Apply) -> Apply:
    """Takes the place of `original`, and calls it where ours was not compared or gains nothing."""

    @functools.wraps(original)
    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        *args: Any, unsqueeze_dim: int = 1, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if args or kwargs or not rotation.fits(q, k, cos, sin, unsqueeze_dim) or _is_small(q):
            if unsqueeze_dim != 1:
                kwargs["unsqueeze_dim"] = unsqueeze_dim
            return original(q, k, cos, sin, *args, **kwargs)
        return rotation(q, k, cos, sin, unsqueeze_dim)

    return apply


def _is_small(q: torch.Tensor) -> bool:
    """Whether ours is not faster: on a CPU, where torch.compile fuses the original itself."""
    if not q.is_cpu or backends.named(None) is not None:
        return False
    return torch.compiler.is_compiling() or q.numel() < LEAST_ON_CPU


# --- the function ---------------------------------------------------------------------------------


@functools.cache
def _rotation(name: str, function: FunctionType) -> Rotation | None:
    """The rotation that `function` computes, None if it is none of ours."""
    for interleaved, angles in itertools.product((False, True), ("element", "first half", "pair")):
        found = Rotation(name, interleaved, angles)
        if _same(function, found, HEAD_DIM // 2 if angles == "pair" else HEAD_DIM):
            partial = dataclasses.replace(found, partial=True)
            return partial if _same(function, partial, PART) else found
    return None


def _same(function: Apply, rotation: Rotation, width: int) -> bool:
    """Whether both compute the same of random heads and angles, by the numeric rule."""
    takes_dim = "unsqueeze_dim" in inspect.signature(function).parameters
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype, dim in itertools.product(
            (torch.float32, torch.bfloat16), (1, 2) if takes_dim else (1,)
        ):
            draw = Draw(dtype, torch.device("cpu"))
            shapes = [(2, heads, 37, HEAD_DIM) for heads in (HEADS, KV_HEADS)]
            if dim == 2:
                shapes = [(2, 37, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS)]
            q, k = (draw.normal(*shape) for shape in shapes)
            cos, sin = draw.normal(2, 37, width), draw.normal(2, 37, width)
            given = q, k, cos, sin
            options = {"unsqueeze_dim": dim} if dim != 1 else {}
            try:
                exact = function(*(x.double() for x in given), **options)
                theirs = function(*given, **options)
                pairs = [*zip(rotation(q, k, cos, sin, dim), theirs, exact, strict=True)]
            except Exception:  # the function may be anything
                return False
            for a, b, c in pairs:
                if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
                    return False
                if rule.compare(a, b, c).violation is not None:
                    return False
    return True


# --- the forward ----------------------------------------------------------------------------------


class _Globals(dict[str, Any]):
    """The globals of a function's module as they are at each lookup, with some names replaced.

    A copy would go stale when a name of the module is set later. A lookup in a dict's subclass goes
    through `__getitem__`. The items of the dict itself are a copy nonetheless: torch.compile reads
    them for its guards, and adds names of its own. Without `__name__` among them, by which it would
    guard the module's functions in place of these.
    """

    def __init__(self, original: dict[str, Any], replaced: dict[str, Any]) -> None:
        super().__init__({**original, **replaced})
        self.pop("__name__", None)
        self._original, self._replaced = original, replaced

    def __getitem__(self, name: str) -> Any:
        if name in self._original and name not in self._replaced:
            return self._original[name]
        return super().__getitem__(name)


def _rebound(function: FunctionType, replaced: dict[str, Any]) -> FunctionType:
    """`function` with other globals; where it wraps another one (a decorator), that one."""
    wrapped = _wrapped(function)
    names, closure = function.__globals__, function.__closure__
    if wrapped is None:
        names = _Globals(names, replaced)
    else:
        inner = _rebound(wrapped, replaced)
        closure = tuple(CellType(inner) if _holds(c, wrapped) else c for c in closure or ())
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(made, function)
    made.__kwdefaults__ = function.__kwdefaults__
    if wrapped is None:
        del made.__wrapped__  # type: ignore[attr-defined]
    else:
        made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made


def _wrapped(function: Any) -> FunctionType | None:
    wrapped: FunctionType | None = vars(function).get("__wrapped__")
    return wrapped


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


def _innermost(forward: Any) -> FunctionType | None:
    """The function that decorators have wrapped, None where one does not keep it in its closure."""
    while isinstance(forward, FunctionType):
        wrapped = _wrapped(forward)
        if wrapped is None:
            return forward
        if not any(_holds(cell, wrapped) for cell in forward.__closure__ or ()):
            return None
        forward = wrapped
    return None


class RotaryAttentionSwap(AttentionSwap):
    """`AttentionSwap`, and its original's forward with our function for the rotary embedding."""

    _fastattn_bound: ClassVar[tuple[str, Rotation]]

    @staticmethod
    def recogniser(bound: Any) -> Recogniser:
        return recogniser(*bound)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (original := vars(cls).get("_fastattn_original")) is None:  # a tool's subclass
            return
        _, rotation = cls._fastattn_bound
        innermost = _innermost(original.forward)
        assert innermost is not None
        ours = _ours(rotation, innermost.__globals__[rotation.name])
        cls.forward = _rebound(original.forward, {rotation.name: ours})


@functools.cache
def recogniser(replaced: str, rotation: Rotation) -> Recogniser:
    of_attention = swap.RECOGNISERS[replaced]

    def backend(module: torch.nn.Module, probe: Probe) -> str | None:
        q = swap.example(module, probe)
        cos = q.new_empty(*q.shape[:2], q.shape[3])
        options = {"interleaved": rotation.interleaved}
        of_rotary = explanation_of(rotary, q, q, cos, cos, **options).backend
        return f"{of_attention.backend(module, probe)}, rotary {of_rotary}"

    return dataclasses.replace(
        of_attention,
        words=f"{of_attention.words}, with {rotation}",
        mixin=RotaryAttentionSwap,
        backend=backend,
        bound=(replaced, rotation),
    )


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    dispatching = next(swap.of(module), None)
    if dispatching is None:
        return
    replaced: Any = dispatching.bound
    forward = _innermost(type(module).forward)
    if forward is None or any(x.opname == "STORE_GLOBAL" for x in dis.get_instructions(forward)):
        return
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if isinstance(function, FunctionType) and _arguments(function)[:4] == ARGUMENTS:
            rotation = _rotation(name, function)
            if rotation is not None:
                yield recogniser(*replaced, rotation)


def _arguments(function: FunctionType) -> list[str]:
    return [*inspect.signature(function).parameters]
