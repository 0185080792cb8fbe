"""The rotary embedding that a function computes, and ours in its place.

The function is known by its first arguments, q, k, cos and sin, and by what it computes: it is
called on random heads and angles, and has to be one of the rotations that `fastattn.rotary` has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from fastattn import backends, rule
from fastattn.integrations.hypotheses import deferred_norm
from fastattn.integrations.proof import Draw
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
        angles: the meaning of cos and sin: an angle for each "element" or each "pair" of a head, or
            of each element of which only the "first half" counts.
        partial: whether narrower cos and sin rotate a part of each head.
        dims: theirs: 3 for (batch, seqlen, width), 2 for (seqlen, width).
    """

    name: str
    interleaved: bool
    angles: str
    partial: bool = False
    dims: int = 3

    def __str__(self) -> str:
        pairs = "interleaved pairs" if self.interleaved else "pairs of halves"
        return f"rotary embedding by {self.name} of {pairs}"

    def fits(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int
    ) -> bool:
        """Whether a call is one of those that were compared with the original."""
        if not all(isinstance(x, torch.Tensor) for x in (q, k, cos, sin)):
            return False
        if not (q.dim() == k.dim() == 4 and cos.dim() == self.dims and dim in (1, 2)):
            return False
        if self.dims == 2 and len(cos) != q.shape[3 - dim]:
            return False
        if not q.dtype == k.dtype == cos.dtype == sin.dtype or cos.shape != sin.shape:
            return False
        head_dim, width = q.shape[3], cos.shape[-1] * (2 if self.angles == "pair" else 1)
        return width == head_dim or (self.partial and width < head_dim)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int,
        **norms: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """q and k rotated, after their `norms`, which are arguments of `rotary`."""
        width = cos.shape[-1]
        rotary_dim = 2 * width if self.angles == "pair" else width
        if self.angles == "first half":
            cos, sin = cos[..., : width // 2], sin[..., : width // 2]
        if dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        options = {"rotary_dim": rotary_dim, "interleaved": self.interleaved, **norms}
        q, k = rotary(q, k, cos, sin, **options)
        return (q.transpose(1, 2), k.transpose(1, 2)) if dim == 1 else (q, k)


def ours(rotation: Rotation, original: Apply) -> Apply:
    """Takes the place of `original`, and calls it where ours was not compared or gains nothing."""

    @functools.wraps(original)
    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        *args: Any, unsqueeze_dim: int = 1, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        heads, norms = deferred_norm.taken_off(q, k)
        other = args or kwargs or not rotation.fits(*heads, cos, sin, unsqueeze_dim)
        if not (other or is_small(heads[0])):
            return rotation(*heads, cos, sin, unsqueeze_dim, **norms)
        if unsqueeze_dim != 1:
            kwargs["unsqueeze_dim"] = unsqueeze_dim
        return original(deferred_norm.read(q), deferred_norm.read(k), cos, sin, *args, **kwargs)

    return apply


def is_small(x: torch.Tensor) -> bool:
    """Whether ours is not faster: on a CPU, where torch.compile fuses the original itself."""
    if not x.is_cpu or backends.named(None) is not None:
        return False
    return torch.compiler.is_compiling() or x.numel() < LEAST_ON_CPU


@contextlib.contextmanager
def every_size() -> Iterator[None]:
    """Ours runs inside, however small a call is: the proof's are."""
    global LEAST_ON_CPU
    before, LEAST_ON_CPU = LEAST_ON_CPU, 0
    try:
        yield
    finally:
        LEAST_ON_CPU = before


def rotations(forward: FunctionType) -> Iterator[Rotation]:
    """Those of the functions that a forward names."""
    if any(x.opname == "STORE_GLOBAL" for x in dis.get_instructions(forward)):
        return  # other globals than it writes to
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if not isinstance(function, FunctionType) or _arguments(function)[:4] != ARGUMENTS:
            continue
        if (rotation := rotation_of(name, function)) is not None:
            yield rotation


@functools.cache
def rotation_of(name: str, function: FunctionType) -> Rotation | None:
    """The rotation that `function` computes, None if it is none of ours."""
    kinds = itertools.product((3, 2), (False, True), ("element", "first half", "pair"))
    for dims, interleaved, angles in kinds:
        found = Rotation(name, interleaved, angles, dims=dims)
        if _same(function, found, HEAD_DIM // 2 if angles == "pair" else HEAD_DIM):
            partial = dataclasses.replace(found, partial=True)
            return partial if _same(function, partial, PART) else found
    return None


def _arguments(function: FunctionType) -> list[str]:
    return [*inspect.signature(function).parameters]


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
            cos, sin = (draw.normal(*(2, 37, width)[-rotation.dims :]) for _ in range(2))
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
