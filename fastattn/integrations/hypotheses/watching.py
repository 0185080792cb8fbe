"""Which attention a module writes out, by watching a run of it (hypotheses/written_out.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import math
from collections.abc import Hashable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch

from fastattn import backends
from fastattn.integrations.hypotheses.feed_forward import sizes
from fastattn.integrations.hypotheses.written_out import (
    Mask,
    Written,
    drawn_inputs,
    drawn_mask,
    recogniser,
)
from fastattn.integrations.proof import Draw, bare_copy, configuration, isolated
from fastattn.integrations.recogniser import Recogniser

BATCH, SEQLEN = 3, 5  # of the run that is watched
MAX_FOUND = 64

_found: dict[Hashable, Written | None] = {}  # whatever is wrong here, the proof refuses


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    if not _may_be(module):
        return
    key = configuration(module)
    if key not in _found:
        if len(_found) >= MAX_FOUND:
            _found.clear()
        try:
            _found[key] = _watched(module)
        except Exception:  # it may be anything
            _found[key] = None
    if (written := _found[key]) is not None:
        yield recogniser(written)


def _may_be(module: torch.nn.Module) -> bool:
    """Whether all parameters are those of two or four linear layers that fit."""
    cls = type(module)
    if not isinstance(cls.forward, FunctionType) or cls.__module__.partition(".")[0] == "torch":
        return False
    layers = {name: layer for name, layer in module.named_modules() if sizes(layer)}
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    if len(layers) not in (2, 4) or any(id(p) not in owned for p in module.parameters()):
        return False
    if any(type(p) is not torch.nn.Parameter or p.is_meta for p in module.parameters()):
        return False  # sharded, quantised, not loaded
    if len(layers) == 4:
        return True
    (joint, last) = (sizes(layer) for layer in layers.values())
    return joint[1] == 3 * last[0] or last[1] == 3 * joint[0]


class _Call(NamedTuple):
    """A layer's call."""

    name: str
    given: torch.Tensor
    returned: torch.Tensor


class _Watch:
    """A copy of a module in float64, and what its layers get in a run of it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = bare_copy(module, lambda tensor: tensor.detach().double())
        self.module.__class__ = getattr(type(module), "_fastattn_original", type(module))
        self.module.eval()

    def __call__(self, *args: torch.Tensor | None) -> list[_Call]:
        """The layers' calls, in their order; the last one's output is the module's."""
        calls: list[_Call] = []

        def record(name: str) -> Any:
            return lambda _, args, out: calls.append(_Call(name, args[0], out))

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for name, layer in self.module.named_modules():
                if sizes(layer):
                    hooks.enter_context(layer.register_forward_hook(record(name)))
            result = self.module(*args)
        returned = calls[-1].returned
        if result is not returned and not torch.equal(result, returned):  # the first with any nan
            raise ValueError("something is done with the last layer's output")
        return calls


def _watched(module: torch.nn.Module) -> Written | None:
    device = next(module.parameters()).device
    draw = Draw(torch.float64, device)
    with isolated(device), backends.use_backend("reference"):
        watch = _Watch(module)
        _, *parameters = inspect.signature(type(watch.module).forward).parameters.values()
        parameters = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        inputs = sum(p.default is p.empty for p in parameters if "mask" not in p.name)
        if inputs not in (1, 3):
            return None
        mask = next((p.name for p in parameters[inputs : inputs + 1] if "mask" in p.name), "")
        x = drawn_inputs(module, inputs, draw, BATCH, SEQLEN)
        none = [None] if mask else []
        *calls, last = watch(*x, *none)
        # Does the last token change what is before it?
        other = watch(*(torch.cat([each[:, :-1], -each[:, -1:]], 1) for each in x), *none)
        causal = torch.allclose(other[-1].given[:, :-1], last.given[:, :-1], atol=1e-12)
        for written in _candidates(module, calls, last, x, causal):
            if _same(written, calls, last, None):
                written = dataclasses.replace(written, mask=mask)
                if written.causal and not _only_causal(module):
                    return None
                return _with_masks(written, watch, x, draw) if mask else written
    return None


def _candidates(
    module: torch.nn.Module, calls: list[_Call], last: _Call, x: tuple[torch.Tensor, ...],
    causal: bool,
) -> Iterator[Written]:  # fmt: skip
    if len(calls) not in (1, 3):
        return
    names, inner = [call.name for call in calls], last.given.shape[-1]
    orders = [*itertools.permutations(range(3))]
    if len(x) == 3:
        orders = [tuple(next(i for i, c in enumerate(calls) if c.given is each) for each in x)]
    numbers = _numbers(module)
    counts = {inner, *(int(n) for n in numbers if n == int(n) and 0 < n <= inner)}
    head_dims = {d for n in counts if inner % n == 0 for d in (n, inner // n)}
    scales = [inner**-0.5, 1.0, *numbers, *(1 / n for n in numbers)]
    for order, head_dim in itertools.product(orders, sorted(head_dims)):
        for scale, by_head in itertools.product(
            dict.fromkeys([head_dim**-0.5, *scales]), (False, True) if len(calls) == 1 else (False,)
        ):
            yield Written(
                layers=tuple(names[i] for i in order) if len(calls) == 3 else tuple(names),
                out=last.name, inputs=len(x), order=order, by_head=by_head, head_dim=head_dim,
                scale=scale, causal=causal, limit=_limit(module), mask="",
            )  # fmt: skip


def _numbers(module: torch.nn.Module) -> list[float]:
    """The module's attributes, and buffers, that are a number."""
    buffers = [float(b) for b in module._buffers.values() if b is not None and b.numel() == 1]
    attributes = [v for v in vars(module).values() if type(v) in (int, float)]
    return [abs(n) for n in (*attributes, *buffers) if n and math.isfinite(n)]


def _squares(module: torch.nn.Module) -> list[torch.Tensor]:
    return [b for b in module.buffers() if b.dim() > 1 and b.shape[-1] == b.shape[-2] > 1]


def _limit(module: torch.nn.Module) -> int | None:
    return min((b.shape[-1] for b in _squares(module)), default=None)


def _only_causal(module: torch.nn.Module) -> bool:
    """Whether buffers of masks are causal beyond the length of the run that was watched."""
    for buffer in _squares(module):
        size = buffer.shape[-1]
        if buffer.numel() != size * size:
            return False
        marked = buffer.reshape(size, size) != 0
        seen = torch.ones_like(marked).tril()
        if not (torch.equal(marked, seen) or torch.equal(marked, ~seen)):
            return False
    return True


def _same(written: Written, calls: list[_Call], last: _Call, mask: torch.Tensor | None) -> bool:
    by_name = {call.name: call.returned for call in calls}
    try:
        ours = written.attended([by_name[name] for name in written.layers], mask)
    except (ValueError, RuntimeError):  # shapes that do not fit
        return False
    theirs = last.given
    if ours is None or ours.shape != theirs.shape:
        return False
    if mask is not None:  # a query that sees nothing is nan there where the score is -inf
        ours = ours.where(theirs.isfinite(), 0.0)
        theirs = theirs.where(theirs.isfinite(), 0.0)
    return torch.allclose(ours, theirs, rtol=0.0, atol=1e-6)


def _with_masks(
    written: Written, watch: _Watch, x: tuple[torch.Tensor, ...], draw: Draw
) -> Written:
    """`written` with the forms of masks that it takes, one for each number of dimensions."""
    forms: list[Mask] = []
    for dims, of_keys, added in itertools.product((2, 3, 4), (False, True), (False, True)):
        if of_keys and dims > 2:
            continue
        mask = drawn_mask(Mask(dims, of_keys, None if added else True, True), draw, BATCH, SEQLEN)
        try:
            *calls, last = watch(*x, mask)
        except Exception:  # it takes none of this kind
            continue
        kinds = [(None, False)] if added else [*itertools.product((True, False), (False, True))]
        for seen, finite in kinds:
            form = Mask(dims, of_keys, seen, finite)
            if _same(dataclasses.replace(written, masks=(form,)), calls, last, mask):
                forms.append(form)
                break
    return dataclasses.replace(written, masks=tuple(forms))
