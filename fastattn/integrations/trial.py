"""A model's swaps on a batch of the user: how far the results differ, and how fast each class is.

Original and accelerated are one model with other classes, so nothing is copied: it runs once so and
once so. A class is timed by the calls that its modules get in such a run, repeated, the original
and ours interleaved.

Afterwards the model is as before: modes, gradients, buffers, hooks and random generators.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from fastattn.integrations.proof import bare_copy, configuration
from fastattn.nn.mode import in_mode
from fastattn.timing import Candidate, interleave, ratio

SEED = 20_261_129
ROUNDS = 15
SECONDS = 0.5  # for the rounds of one class
LARGEST_SHOWN = 3
# Ours is called slower from this ratio of times on, if four rounds in five say so.
SLOWER = 1.05


class Swap(NamedTuple):
    """A module and the classes between which it is swapped."""

    module: torch.nn.Module
    original: type[torch.nn.Module]
    ours: type[torch.nn.Module]


@dataclass(frozen=True, eq=False)
class Speed:
    """Seconds of one call of a module, as the original and on fastattn: the median of each.

    Attributes:
        backward: whether a call is forward and backward (a model in train mode), else forward.
        slower: whether ours takes more than 1.05 of the time, in four rounds of five.
    """

    class_name: str
    original: float
    fastattn: float
    backward: bool
    slower: bool

    def __str__(self) -> str:
        what = "forward and backward" if self.backward else "forward"
        times = f"{_duration(self.original)} -> {_duration(self.fastattn)}"
        return f"{self.original / self.fastattn:.2f}x, {times}, {what}"


@dataclass(frozen=True)
class Difference:
    """The largest difference of two tensors, and the root mean square of the original's values."""

    name: str
    largest: float
    scale: float

    @property
    def relative(self) -> float:
        if not self.largest:
            return 0.0
        return self.largest / self.scale if self.scale else math.inf

    def __str__(self) -> str:
        return f"{self.name} {self.relative:.1e}"


@dataclass(frozen=True)
class Trial:
    """What a batch showed. Every number of `outputs` and `gradients` is relative to the rms."""

    outputs: tuple[Difference, ...]
    gradients: tuple[Difference, ...]
    speeds: tuple[tuple[Speed, int], ...]  # and how many modules it stands for

    def __str__(self) -> str:
        lines = ["on the batch, ours against the original (difference / rms):"]
        for name, found in (("outputs", self.outputs), ("gradients", self.gradients)):
            largest = sorted(found, key=lambda d: d.relative, reverse=True)[:LARGEST_SHOWN]
            text = ", ".join(map(str, largest)) or "none"
            lines.append(f"  {name:<9}  {len(found)} tensors; the largest: {text}")
        width = max((len(speed.class_name) for speed, _ in self.speeds), default=0)
        for speed, count in self.speeds:
            lines.append(f"  speed      {speed.class_name:<{width}}  {count:>3}  {speed}")
        return "\n".join(lines)


def try_out(model: torch.nn.Module, batch: Any, swaps: Sequence[Swap]) -> Trial:
    """Run an accelerated `model` and its original on `batch`.

    Raises:
        RuntimeError: they return different things, or ours is not finite where the original is.
    """
    outputs, gradients = _differences(model, batch, swaps)
    by_module, _ = speeds(model, batch, swaps)
    counts: dict[Speed, int] = {}
    for speed in by_module.values():
        counts[speed] = counts.get(speed, 0) + 1
    return Trial(outputs, gradients, tuple(counts.items()))


# --- differences ---------------------------------------------------------------------------------


def _differences(
    model: torch.nn.Module, batch: Any, swaps: Sequence[Swap]
) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """Of the outputs and of the parameters' gradients, in eval mode, where nothing is dropped."""
    with in_mode(model, training=False), _isolated(model), torch.enable_grad():
        with _classes((swap.module, swap.original) for swap in swaps):
            theirs = _outputs_and_gradients(model, batch)
        with _classes((swap.module, swap.ours) for swap in swaps):
            ours = _outputs_and_gradients(model, batch)
    found: list[tuple[Difference, ...]] = []
    for original, accelerated in zip(theirs, ours, strict=True):
        if original.keys() != accelerated.keys():
            only = ", ".join(sorted(original.keys() ^ accelerated.keys()))
            raise RuntimeError(
                f"the original and the accelerated model differ in what they return: {only}; "
                "fastattn.restore(model) turns it back"
            )
        found.append(tuple(_difference(n, original[n], accelerated[n]) for n in original))
    return found[0], found[1]


def _outputs_and_gradients(
    model: torch.nn.Module, batch: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    outputs = dict(_tensors(_forward(model, batch)))
    sources = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # The loss where there is one: what comes beside it is not trained on.
    trained = {"loss": outputs["loss"]} if "loss" in outputs else outputs
    trained = {n: x for n, x in trained.items() if x.requires_grad}
    if not (sources and trained):
        return outputs, {}
    gradients = torch.autograd.grad(
        [*trained.values()], [*sources.values()], _cotangents(trained.values()), allow_unused=True
    )
    named = zip(sources, gradients, strict=True)
    return (
        {name: x.detach() for name, x in outputs.items()},
        {name: gradient for name, gradient in named if gradient is not None},
    )


def _difference(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> Difference:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        raise RuntimeError(
            f"{name} is {tuple(ours.shape)} {ours.dtype}, the original's {tuple(theirs.shape)} "
            f"{theirs.dtype}; fastattn.restore(model) turns the model back"
        )
    if not theirs.numel():
        return Difference(name, 0.0, 0.0)
    wide = torch.promote_types(theirs.dtype, torch.float32)
    theirs, ours = theirs.to(wide), ours.to(wide)
    same = (theirs == ours) | (theirs.isnan() & ours.isnan())  # also two infinities
    largest = float((ours - theirs).abs().where(~same, 0.0).amax())
    if not math.isfinite(largest):
        raise RuntimeError(
            f"{name} has values that are not finite where the original's are, or the other way "
            "round; fastattn.restore(model) turns the model back"
        )
    finite = theirs.where(theirs.isfinite(), 0.0)
    return Difference(name, largest, float(finite.square().mean().sqrt()))


# --- speed ---------------------------------------------------------------------------------------


def speeds(
    model: torch.nn.Module, batch: Any, swaps: Sequence[Swap]
) -> tuple[dict[torch.nn.Module, Speed], dict[torch.nn.Module, str]]:
    """The speed of every swap that `batch` reaches; equal modules share one measurement.

    And of the others why not: a call cannot be repeated that counts on a cache, or on what ran
    before it.
    """
    groups: dict[Hashable, list[Swap]] = {}
    for swap in swaps:
        groups.setdefault((configuration(swap.module), swap.ours), []).append(swap)
    found: dict[torch.nn.Module, Speed] = {}
    untimed = {swap.module: "the batch does not reach it" for swap in swaps}
    with _isolated(model), torch.set_grad_enabled(model.training):
        with _classes((swap.module, swap.original) for swap in swaps):
            calls = _calls(model, batch, groups)
        for key, call in calls.items():
            group = [swap.module for swap in groups[key]]
            try:
                speed = _speed(groups[key][0], *call)
            except Exception as error:
                reason = f"its call cannot be repeated: {type(error).__name__}: {error}"
                untimed.update(dict.fromkeys(group, reason))
            else:
                found.update(dict.fromkeys(group, speed))
    return found, {module: reason for module, reason in untimed.items() if module not in found}


def _calls(
    model: torch.nn.Module, batch: Any, groups: Mapping[Hashable, Sequence[Swap]]
) -> dict[Hashable, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of the first call of a module of each group, where there is one."""
    calls: dict[Hashable, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recording(key: Hashable) -> Any:
        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(key, (args, kwargs))

        return record

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for key, group in groups.items():
            for module, *_ in group:
                hook = module.register_forward_pre_hook(recording(key), with_kwargs=True)
                hooks.enter_context(hook)
        _forward(model, batch)
    return calls


def _speed(swap: Swap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Speed:
    module = bare_copy(swap.module, torch.Tensor.detach, keep_dropout=True)
    backward = torch.is_grad_enabled()
    sources: list[torch.Tensor] = [p for p in module.parameters() if backward]

    def repeatable(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            leaf = value.detach()
            if backward and leaf.is_floating_point():
                sources.append(leaf.requires_grad_())
            return leaf
        if type(value) in (tuple, list):
            return type(value)(map(repeatable, value))
        # A cache of keys and values would grow with every call.
        return None if hasattr(value, "get_seq_length") else value

    args = tuple(map(repeatable, args))
    kwargs = {name: repeatable(value) for name, value in kwargs.items()}
    device = next((x.device.type for x in (*sources, *module.parameters())), "cpu")
    cotangents: list[torch.Tensor] = []

    def call() -> None:
        outputs = module(*args, **kwargs)
        if backward:
            trained = [x for _, x in _tensors(outputs) if x.requires_grad]
            if not cotangents:
                cotangents.extend(map(torch.ones_like, trained))
            torch.autograd.grad(trained, sources, cotangents, allow_unused=True)

    candidates = [
        Candidate(name, call, partial(_classes, [(module, cls)]))
        for name, cls in (("original", swap.original), ("fastattn", swap.ours))
    ]
    samples = interleave(
        candidates, device=device, rounds=ROUNDS, batch_seconds=1e-3, seconds=SECONDS
    )
    original, ours = samples["original"], samples["fastattn"]
    spread = ratio(ours, original)
    return Speed(
        class_name=swap.original.__name__,
        original=original.median,
        fastattn=ours.median,
        backward=backward,
        slower=spread.median > SLOWER and spread.p20 > 1.0,
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


# --- one run of a model --------------------------------------------------------------------------


def _forward(model: torch.nn.Module, batch: Any) -> Any:
    """`model` on `batch`, its buffers (running statistics) staying as they are."""

    def usable(x: Any) -> Any:  # by autograd
        return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {name: usable(x) for name, x in batch.items()}
    else:
        given = (batch,) if isinstance(batch, torch.Tensor) else batch
        args = tuple(map(usable, given))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, args, kwargs)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The floating-point tensors in what a module returned, with names."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name or "output", value
    elif isinstance(value, (Mapping, tuple, list)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _cotangents(outputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of one seed: equal for both runs."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype)
        for x in outputs
    ]


@contextlib.contextmanager
def _classes(
    classes: Iterable[tuple[torch.nn.Module, type[torch.nn.Module]]],
) -> Iterator[None]:
    """Each module with the class beside it; afterwards with the one that it had."""
    before: list[tuple[torch.nn.Module, type[torch.nn.Module]]] = []
    try:
        for module, cls in classes:
            before.append((module, type(module)))
            module.__class__ = cls
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls


@contextlib.contextmanager
def _isolated(model: torch.nn.Module) -> Iterator[None]:
    """Outside of inference mode; the random generators of the model's devices as before after."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[*devices]), torch.inference_mode(False):
        yield
