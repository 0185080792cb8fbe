"""Proof by probe: may another class compute what a module computes?

The module's copy is run on random input with random weights three times: by its own class, by the
class that shall replace it, and by its own class in float64. The replacement may be no less exact
than the original, by the rule that fastattn's kernels are tested with (fastattn/rule.py): for every
output, with autograd and without, and every gradient (of the inputs and of the weights), in eval
and in train mode, with dropout switched off.

Nothing of this touches the module: not its weights, gradients, training flag or hooks, and neither
the random generators, nor the modes of autograd and autocast of the caller.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fastattn import rule

if TYPE_CHECKING:
    from fastattn.integrations.recogniser import Recogniser

SEED = 20_231_117
ZERO = 1e-12  # of the largest result, in float64


@dataclass(frozen=True)
class Probe:
    """The arguments of one call of `forward`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Random tensors in a module's dtype and on its device, from a generator of their own."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(SEED)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return values.to(self.device, self.dtype)

    def coin(self, *shape: int) -> torch.Tensor:
        """Boolean, True and False alike often."""
        values = torch.rand(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (values < 0.5).to(self.device)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, of a buffer that is no weight."""
        return tensor.to(self.device, self.dtype)

    def like_weight(self, tensor: torch.Tensor) -> torch.Tensor:
        """Normal, scaled so that a product with it keeps its input's scale."""
        scale = max(tensor.shape) ** -0.5 if tensor.dim() > 1 else 1.0
        return self.normal(*tensor.shape) * scale


def configuration(module: torch.nn.Module) -> Hashable:
    """The properties that two modules must share for the proof of one to hold for the other.

    Classes, settings, and the tensors' shapes, dtypes and devices, of the module and all its
    children; not the values of the weights, nor which layer of the model it is.
    """
    parts: list[Hashable] = []
    for name, part in module.named_modules():
        settings = []
        for key, value in part.__dict__.items():
            if key.startswith("_") or key in ("training", "layer_idx"):
                continue
            if isinstance(value, MethodType) and value.__self__ is part:
                continue
            # Any other object (a config, a function) has to be the same one.
            settings.append((key, value if _is_plain(value) else id(value)))
        tensors = [
            (key, None if tensor is None else (tensor.shape, tensor.dtype, tensor.device))
            for key, tensor in (*part._parameters.items(), *part._buffers.items())
        ]
        parts.append((name, type(part), tuple(settings), tuple(tensors)))
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    """Whether two values are compared, and not the objects."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None)))


class Mismatch(NamedTuple):
    """Why a replacement may not stand in, and how far it is off: error over what is allowed."""

    reason: str
    factor: float = math.inf


def mismatch(
    module: torch.nn.Module,
    original: type[torch.nn.Module],
    replacement: type[torch.nn.Module],
    recogniser: Recogniser,
    draw: Draw,
) -> Mismatch | None:
    """The reason why `replacement` may not stand in for `original`, or None if it is proven.

    Args:
        module: an instance of either class; it is left as it is.
        recogniser: its probes make the calls to compare, given the copy of `module` and `draw`.
    """
    with isolated(draw.device), recogniser.proving():
        buffers = draw.cast if recogniser.keeps_buffers else draw.like_weight
        copy = bare_copy(module, draw.like_weight, buffers)
        copy.__class__ = original
        try:
            reason = recogniser.premise(copy, draw)
        except Exception as error:
            reason = f"it fails on random input: {type(error).__name__}: {error}"
        if reason is not None:
            return Mismatch(reason)
        reference = bare_copy(copy, lambda tensor: tensor.detach().double())
        for training in (False, True):
            mode = "train" if training else "eval"
            try:
                probes = _probes(copy, recogniser, draw)
            except Exception as error:
                return Mismatch(f"no input for it: {type(error).__name__}: {error}")
            for probe in probes:
                runs: list[list[tuple[str, torch.Tensor]]] = []
                for who, subject, cls in (
                    ("the original in float64", reference, original),
                    ("the original", copy, original),
                    ("the replacement", copy, replacement),
                ):
                    subject.__class__ = cls
                    subject.train(training)
                    try:
                        exact = subject is reference
                        runs.append(_run(subject, probe, draw, recogniser.outputs, exact=exact))
                    except Exception as error:
                        text = f"{who} fails on random input: {type(error).__name__}: {error}"
                        return Mismatch(text)
                names = [[name for name, _ in run] for run in runs]
                if names[1] != names[2]:
                    return Mismatch(f"it returns {names[2]}, the original {names[1]} ({mode} mode)")
                largest = max(
                    (float(x.detach().abs().max()) for _, x in runs[0] if x.numel()), default=0.0
                )
                for (name, expected), (_, theirs), (_, ours) in zip(*runs, strict=True):
                    if (finding := _violation(ours, theirs, expected, largest)) is not None:
                        return Mismatch(f"{name} is off in {mode} mode: {finding[0]}", finding[1])
    return None


def _probes(copy: torch.nn.Module, recogniser: Recogniser, draw: Draw) -> Sequence[Probe]:
    """The recogniser's calls; of several guesses the first that the original runs, else the first.

    A guess that is no call of the module at all fails in the same way for all three runs.
    """
    if recogniser.guesses is None:
        return recogniser.probes(copy, draw)
    for probes in recogniser.guesses(copy, draw):
        with torch.no_grad(), contextlib.suppress(Exception):
            for probe in probes:
                copy(*probe.args, **probe.kwargs)
            return probes
    return recogniser.probes(copy, draw)


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off inside; the random generators as before after it."""
    devices = [device] if device.type == "cuda" else []
    state, of_numpy = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:  # modules may draw from these too
        random.setstate(state)
        np.random.set_state(of_numpy)


def bare_copy(
    module: torch.nn.Module,
    convert: Callable[[torch.Tensor], torch.Tensor],
    convert_buffer: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    keep_dropout: bool = False,
) -> torch.nn.Module:
    """A copy with converted floating-point tensors, without hooks and, by default, dropout.

    Buffers are converted as parameters are, or by `convert_buffer`.

    Attributes that are neither tensors nor modules are shared: a deep copy would follow bound
    methods and loggers out of the model. But lists, dicts and sets are its own, as a forward may
    keep something in them.
    """
    copy: torch.nn.Module = object.__new__(type(module))  # whatever arguments its own one takes
    for name, value in module.__dict__.items():
        copy.__dict__[name] = value.copy() if type(value) in (list, dict, set) else value
    copy.__dict__.update(torch.nn.Module().__dict__)  # no parameters, children, hooks
    copy.__dict__.pop("_compiled_call_impl", None)

    def converted(tensor: torch.Tensor | None, convert: Any = convert) -> torch.Tensor | None:
        if tensor is None:
            return None
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        return convert(tensor)

    for name, parameter in module._parameters.items():
        made = converted(parameter)
        copy._parameters[name] = None if made is None else torch.nn.Parameter(made)
    for name, buffer in module._buffers.items():  # they may be written to
        clone = None if buffer is None else buffer.clone()
        copy._buffers[name] = converted(clone, convert_buffer or convert)
    for name, child in module._modules.items():
        if child is not None:
            child = bare_copy(child, convert, convert_buffer, keep_dropout=keep_dropout)
        copy._modules[name] = child
    for name, value in module.__dict__.items():  # Dropout's p, and what attention keeps itself
        dropout = "dropout" in name or isinstance(module, torch.nn.modules.dropout._DropoutNd)
        if dropout and isinstance(value, float) and not keep_dropout:
            copy.__dict__[name] = 0.0
    return copy


def _run(
    module: torch.nn.Module, probe: Probe, draw: Draw, count: int | None, *, exact: bool
) -> list[tuple[str, torch.Tensor]]:
    """Outputs and gradients by name. `exact` computes in float64, on the same rounded numbers."""
    dtype = torch.float64 if exact else draw.dtype
    leaves: dict[int, torch.Tensor] = {}  # one for a tensor that is several arguments, as it was

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if id(value) not in leaves:
                leaves[id(value)] = value.detach().to(dtype, copy=True).requires_grad_()
            return leaves[id(value)]
        if isinstance(value, dict):  # one that the module may write into
            return {key: leaf(entry) for key, entry in value.items()}
        return tuple(map(leaf, value)) if isinstance(value, tuple) else value

    args = [leaf(value) for value in probe.args]
    kwargs = {key: leaf(value) for key, value in probe.kwargs.items()}

    def outputs(suffix: str) -> list[tuple[str, torch.Tensor]]:
        result = module(*args, **kwargs)
        several = [result] if isinstance(result, torch.Tensor) else list(result)[:count]
        tensors = [(i, out) for i, out in enumerate(several) if isinstance(out, torch.Tensor)]
        return [(f"output {i}{suffix}", out) for i, out in tensors]

    named = outputs("")
    cotangents = Draw(draw.dtype, draw.device)  # of the same seed: equal for all three runs
    sources = [(f"input {i}", tensor) for i, tensor in enumerate(leaves.values())]
    sources += list(module.named_parameters())
    gradients = torch.autograd.grad(
        [out for _, out in named if out.requires_grad],
        [source for _, source in sources],
        [cotangents.normal(*out.shape).to(dtype) for _, out in named if out.requires_grad],
        allow_unused=True,
    )
    named += [
        (f"the gradient of {name}", gradient)
        for (name, _), gradient in zip(sources, gradients, strict=True)
        if gradient is not None
    ]
    with torch.no_grad():  # inference may take another path
        return named + outputs(" under no_grad")


def _violation(
    ours: torch.Tensor, theirs: torch.Tensor, expected: torch.Tensor, largest: float
) -> Mismatch | None:
    """How `ours` breaks the rule, or None.

    A result that is zero in exact arithmetic (the gradient of the bias of an attention's keys) has
    the scale of the `largest` of the run, whose like has cancelled in it.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Mismatch(
            f"{tuple(ours.shape)} {ours.dtype}, the original gives {tuple(theirs.shape)} "
            f"{theirs.dtype}"
        )
    zero = expected.numel() > 0 and float(expected.detach().abs().max()) <= ZERO * largest
    found = rule.compare(ours, theirs, expected, terms=largest if zero else 0.0)
    if found.violation is None:
        return None
    off = found.max / max(found.eager_max, torch.finfo(ours.dtype).tiny)
    return Mismatch(found.violation, math.inf if math.isnan(off) else off)
