"""Run a model's modules on fastattn by changing their class, in place and reversibly.

    model = AutoModelForCausalLM.from_pretrained(...)
    print(fastattn.accelerate(model))       # which modules, and which not and why
    ...                                     # train, generate, save as before
    fastattn.restore(model)

A swap is `module.__class__ = ...` and nothing else: parameters, buffers, hooks, names, optimiser
state and every attribute stay the objects that they were. The new class is made from ours and from
the original one, so `isinstance` holds and whatever is not replaced is inherited; it is remembered
by the class, not by the instance, so a deep copy or a pickle of an accelerated model is accelerated
and can be restored too.

Classes of torch are known by a table (torch_nn.py). Any other module is examined by what it
contains (hypotheses/). Each hypothesis that fits gives a `Recogniser`: what our forward would be,
when it may be used and how to call such a module. The proof (proof.py) decides, and the first that
is proven is swapped in.
"""

from __future__ import annotations

import copyreg
import fnmatch
import math
from collections.abc import Container, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastattn.integrations import hypotheses
from fastattn.integrations.hypotheses.head import HEAD
from fastattn.integrations.proof import Draw, Mismatch, configuration, mismatch
from fastattn.integrations.recogniser import Recogniser
from fastattn.integrations.report import Entry, Report
from fastattn.integrations.torch_nn import TABLE
from fastattn.integrations.trial import Swap, speeds, try_out
from fastattn.nn.plain import COMPUTING_WEIGHTS

HYPOTHESIS_DTYPES = (torch.float32, torch.bfloat16)

ALREADY = "already runs on fastattn"
UNKNOWN = "fastattn has nothing for this class"
EXCLUDED = "excluded by the caller"
NOT_ASKED_FOR = "not among those that the caller asked for (only=)"


class Swapped:
    """The base of all classes that `accelerate` makes."""

    _fastattn_original: ClassVar[type[torch.nn.Module]]
    _fastattn_recogniser: ClassVar[Recogniser]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so a pickle names the original one, and makes it again.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        constructor, args, *rest = reduced
        newobj = copyreg.__newobj__  # type: ignore[attr-defined]
        if constructor is newobj and "_fastattn_original" in vars(args[0]):
            recogniser = self._fastattn_recogniser
            made = self._fastattn_original, recogniser.mixin, recogniser.bound
            return _new, (*made, *args[1:]), *rest
        return reduced


def _new(
    original: type[torch.nn.Module], mixin: Any, bound: Hashable, *args: Any
) -> torch.nn.Module:
    recogniser = TABLE.get(original)
    if recogniser is None or recogniser.mixin is not mixin:
        recogniser = mixin.recogniser(bound)
    cls = replacement(original, recogniser)
    return cls.__new__(cls, *args)


_replacements: dict[Hashable, type[torch.nn.Module]] = {}  # made so far


def replacement(original: type[torch.nn.Module], recogniser: Recogniser) -> type[torch.nn.Module]:
    """The class to which instances of `original` are swapped under `recogniser`."""
    mixin = recogniser.mixin
    key = original, mixin, recogniser.bound
    if key not in _replacements:
        bases = (Swapped, mixin) if issubclass(mixin, original) else (Swapped, mixin, original)
        namespace = {
            "_fastattn_original": original,
            "_fastattn_recogniser": recogniser,
            "_fastattn_bound": recogniser.bound,
            "__module__": mixin.__module__,
            "__doc__": f"{original.__name__} on fastattn; fastattn.restore(model) turns it back.",
        }
        prefix = "Fast" if recogniser.whole else ""
        _replacements[key] = type(f"{prefix}{original.__name__}", bases, namespace)
    return _replacements[key]


def _original_of(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that `accelerate` took `module` from, None if it is not swapped."""
    return type(module)._fastattn_original if isinstance(module, Swapped) else None


def _recognisers(
    module: torch.nn.Module, heads: Container[torch.nn.Module]
) -> Iterator[Recogniser]:
    """The one of a swapped module or of a known class, else those of the hypotheses that fit."""
    if isinstance(module, Swapped):
        yield module._fastattn_recogniser
    elif module in heads:
        yield HEAD
    elif type(module) in TABLE:
        yield TABLE[type(module)]
    elif not _is_ours(type(module)):
        yield from hypotheses.of(module)


def _is_ours(cls: type[torch.nn.Module]) -> bool:
    return cls.__module__.partition(".")[0] == "fastattn"


@dataclass(frozen=True)
class _Unit:
    """A module that a report lists; `cls` is its class before any swap."""

    name: str
    module: torch.nn.Module
    cls: type[torch.nn.Module]
    recognised: bool

    def entry(self, backend: str | None = None, reason: str | None = None) -> Entry:
        return Entry(self.name, self.cls.__name__, backend, reason)


def _units(model: torch.nn.Module) -> Iterator[_Unit]:
    """The modules that are recognised, and others that are neither containers nor their parts."""
    parts: set[torch.nn.Module] = set()
    heads = hypotheses.heads(model)
    for name, module in model.named_modules():
        cls = _original_of(module) or type(module)
        try:
            recogniser = next(_recognisers(module, heads), None)
        except Exception:  # looking at it raises: the examination says so
            yield _Unit(name, module, cls, recognised=True)
            continue
        recognised = recogniser is not None
        if recogniser is not None and not recogniser.whole:
            parts.update(recogniser.fused(module))
        elif recognised or _is_ours(cls):
            parts.update(module.children())
        elif module in parts:
            parts.update(module.children())
            continue
        elif module._modules and not module._parameters and not module._buffers:
            continue
        yield _Unit(name, module, cls, recognised)


def accelerate(
    model: torch.nn.Module,
    *,
    only: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    batch: Any = None,
) -> Report:
    """Run the modules of `model` that fastattn knows on fastattn, in place.

    Norms, MLPs and attentions of any class are swapped where fastattn can prove that it computes
    the same (`fastattn.integrations.hypotheses`). Every distinct configuration is first proven by a
    probe: ours against the original on random input, outputs and gradients, no less exact against
    float64. What fails, and what cannot be swapped (quantised, sharded, offloaded, not yet loaded),
    is left alone with the reason in the report.

    Weights are shared, not copied; `state_dict`, `save_pretrained`, hooks, names, optimisers and
    `isinstance` are as before. Calling it twice is harmless: the second report says "already".
    All modules are swapped together after the last proof: an error leaves the model as it was.

    Hooks that our forward would pass by (on a projection inside an MLP) and wrappers put there
    later (LoRA) are seen at each call: such a module runs its original forward.

    Args:
        model: any `torch.nn.Module`, on any device, in any floating-point dtype.
        only: names of the modules to swap, each with all that it holds, as in
            `model.named_modules()`; a name may have wildcards (`"transformer.h.*.mlp"`). None for
            all.
        exclude: names of modules to leave alone with all that they hold; as `only`, and stronger.
            A module that would compute one of them without calling it (an MLP its layers) is left
            alone as well.
        batch: an input of the model: a mapping for `model(**batch)`, a tuple for `model(*batch)`,
            or a tensor. The model runs on it once, in its mode, and every class of modules is timed
            on what it got there, forward and (in train mode) backward. What is slower on fastattn
            is left alone, and the report says by how much. What the batch does not reach, or what
            cannot be called again out of its place, is swapped without being timed, and the report
            says so.

    Returns:
        A `Report`: `swapped` and `left`, and a table as its `str()`.

    Raises:
        TypeError: `model` is no module, or `only` or `exclude` is a single string.
        ValueError: a name in `only` or `exclude` matches no module.
        Exception: what the model raises on `batch`.
    """
    _check_module(model)
    chosen = None if only is None else _named(model, "only", only)
    excluded = _named(model, "exclude", exclude)
    examine = _Examiner(model, excluded)
    swaps: dict[_Unit, Swap] = {}
    outcome: dict[_Unit, Entry] = {}
    for unit in _units(model):
        reason = _left_alone(unit, chosen, excluded)
        found = _Finding(reason=reason) if reason else examine(unit.module)
        outcome[unit] = unit.entry(found.backend, found.reason)
        if found.recogniser is not None:
            ours = replacement(unit.cls, found.recogniser)
            swaps[unit] = Swap(unit.module, unit.cls, ours)
    untimed: tuple[Entry, ...] = ()
    if batch is not None:
        measured, reasons = speeds(model, batch, [*swaps.values()])
        untimed = tuple(
            unit.entry(outcome[unit].backend, reasons[unit.module])
            for unit in swaps
            if unit.module in reasons
        )
        for unit in [*swaps]:
            speed = measured.get(unit.module)
            if speed is not None and speed.slower:
                del swaps[unit]
                outcome[unit] = unit.entry(reason=f"slower on the batch: {speed}")
    _assign([(swap.module, swap.ours) for swap in swaps.values()])
    swapped = tuple(entry for unit, entry in outcome.items() if unit in swaps)
    left = tuple(entry for unit, entry in outcome.items() if unit not in swaps)
    return Report(swapped, left, untimed=untimed)


def _left_alone(
    unit: _Unit, chosen: set[torch.nn.Module] | None, excluded: set[torch.nn.Module]
) -> str | None:
    """Why a module needs no proof, or None."""
    if isinstance(unit.module, Swapped) or _is_ours(unit.cls):
        return ALREADY
    if not unit.recognised:
        return UNKNOWN
    if unit.module in excluded:
        return EXCLUDED
    if chosen is not None and unit.module not in chosen:
        return NOT_ASKED_FOR
    return _not_swappable(unit.module)


def restore(model: torch.nn.Module) -> None:
    """Undo `accelerate`: every module gets its original class back.

    Works on deep copies and unpickled copies of an accelerated model as well. Does nothing to a
    model that was never accelerated, nor to modules of `fastattn.nn` that were built as such.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: another tool has put its own class over ours (FSDP2, a parametrisation);
            nothing is restored then.
    """
    _check_module(model)
    swaps = []
    for name, module in model.named_modules():
        original = _original_of(module)
        if original is None:
            continue
        if "_fastattn_original" not in vars(type(module)):
            raise RuntimeError(
                f"module {name!r} was accelerated and has then been made a {type(module).__name__} "
                "by another tool: undo that first, then restore"
            )
        swaps.append((module, original))
    _assign(swaps)


def verify(model: torch.nn.Module, batch: Any = None) -> Report:
    """Prove every swapped module of `model` again, as it is now.

    Worth a call when the dtype or the device has changed since `accelerate`, or after unpickling in
    another environment. Without a batch the model itself is not run.

    Args:
        batch: an input of the model, as for `accelerate`. The model runs on it as it is and as it
            was, in eval mode, forward and backward (from its loss, if it returns one), and the
            report has a `trial`: the differences of all outputs and of all gradients, and the
            speed of every class on what the batch gives to it. Nothing of this changes the model.

    Returns:
        A `Report`: `swapped` are the modules proven, `left` are all others; among them those that
        were swapped but run their original forward at present, with the reason (a hook on a
        projection, an adapter, another attention implementation in the config).

    Raises:
        TypeError: `model` is no module.
        RuntimeError: a module fails its proof; the message names each and the deviation. Or the two
            runs on `batch` do not return the same tensors, or not the same finite ones.
        Exception: what the model raises on `batch`.
    """
    _check_module(model)
    examine = _Examiner(model)
    proven: list[Entry] = []
    left: list[Entry] = []
    failed: list[str] = []
    for unit in _units(model):
        if not isinstance(unit.module, Swapped):
            reason: str | None = "not accelerated" if unit.recognised else UNKNOWN
            left.append(unit.entry(reason=ALREADY if _is_ours(unit.cls) else reason))
        elif (reason := _not_swappable(unit.module)) is not None:
            left.append(unit.entry(reason=f"cannot be probed: {reason}"))
        elif (reason := unit.module._fastattn_recogniser.refusal(unit.module)) is not None:
            left.append(unit.entry(reason=f"runs as the original: {reason}"))
        else:
            found = examine(unit.module)
            if found.recogniser is not None:
                proven.append(unit.entry(backend=found.backend))
            else:
                failed.append(f"{unit.name} ({unit.cls.__name__}): {found.reason}")
    if failed:
        raise RuntimeError(
            "these modules do not compute what their original class computes; "
            "fastattn.restore(model) turns them back:\n  " + "\n  ".join(failed)
        )
    if batch is None:
        return Report(tuple(proven), tuple(left))
    swaps = [
        Swap(module, module._fastattn_original, type(module))
        for module in model.modules()
        if isinstance(module, Swapped) and "_fastattn_original" in vars(type(module))
    ]
    return Report(tuple(proven), tuple(left), try_out(model, batch, swaps))


@dataclass(frozen=True)
class _Finding:
    """The recogniser that was proven and the backend that runs it, or why nothing was."""

    recogniser: Recogniser | None = None
    backend: str | None = None
    reason: str | None = None


class _Examiner:
    """Proofs of one run over a model, one for each distinct configuration of a module."""

    def __init__(
        self, model: torch.nn.Module, excluded: Container[torch.nn.Module] = frozenset()
    ) -> None:
        self._excluded = excluded
        # For modules without weights of their own.
        self._default = _kind(model) or (torch.get_default_dtype(), torch.device("cpu"))
        self._heads = hypotheses.heads(model)
        self._findings: dict[Hashable, _Finding | Mismatch] = {}

    def __call__(self, module: torch.nn.Module) -> _Finding:
        """The first recogniser that is proven, else the reason of the nearest or first one."""
        try:
            return self._find(module)
        except Exception as error:  # of a module that refuses to be looked at, copied or subclassed
            return _Finding(reason=f"it cannot be examined: {type(error).__name__}: {error}")

    def _find(self, module: torch.nn.Module) -> _Finding:
        nearest = math.inf
        reason: str | None = None
        about = configuration(module)
        for recogniser in _recognisers(module, self._heads):
            if (refusal := recogniser.refusal(module)) is not None:
                reason = reason or refusal
                continue
            if any(part in self._excluded for part in recogniser.fused(module)):
                reason = reason or f"a part of it is {EXCLUDED}"
                continue
            key = about, recogniser.mixin, recogniser.bound
            if key not in self._findings:
                self._findings[key] = self._examine(module, recogniser)
            found = self._findings[key]
            if isinstance(found, _Finding):
                return found
            if reason is None or found.factor < nearest:
                nearest, reason = found.factor, found.reason
        return _Finding(reason=reason)

    def _examine(self, module: torch.nn.Module, recogniser: Recogniser) -> _Finding | Mismatch:
        original = _original_of(module) or type(module)
        guessed = recogniser is not TABLE.get(original)
        cls = replacement(original, recogniser)
        dtype, device = _kind(module) or self._default
        specimen = recogniser.specimen(module)
        # A hypothesis also has to hold in the dtypes to which the model may be cast.
        tried = dict.fromkeys((dtype, *(HYPOTHESIS_DTYPES if guessed else ())))
        for each in tried:
            found = mismatch(specimen, original, cls, recogniser, Draw(each, device))
            if found is not None:
                taken_for = f"no {recogniser.words}: " if guessed else ""
                return Mismatch(taken_for + found.reason, found.factor)
        with torch.inference_mode(False), torch.enable_grad():
            probe = recogniser.probes(module, Draw(dtype, device))[0]
            return _Finding(recogniser, recogniser.backend(module, probe))


def _kind(module: torch.nn.Module) -> tuple[torch.dtype, torch.device] | None:
    """dtype and device of the first floating-point parameter."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return None


def _not_swappable(module: torch.nn.Module) -> str | None:
    """Why a module of a known class cannot be swapped whatever its class."""
    if "_hf_hook" in module.__dict__:
        return "dispatched or offloaded by Hugging Face accelerate (device_map)"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if any(isinstance(hook, COMPUTING_WEIGHTS) for hook in module._forward_pre_hooks.values()):
        return "its weights are computed before each forward (pruned, or normed weights)"
    kinds = set()
    for name, parameter in module.named_parameters():
        if type(parameter) not in (torch.nn.Parameter, torch.Tensor):
            return f"{name} is a {type(parameter).__name__} (sharded, quantised or not initialised)"
        if parameter.is_meta:
            return f"{name} is on the meta device: load the weights first"
        if parameter.layout is not torch.strided:
            return f"{name} is not dense ({parameter.layout})"
        if not parameter.is_floating_point():
            return f"{name} is quantised ({parameter.dtype})"
        kinds.add((parameter.dtype, parameter.device))
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"its parameters are of several kinds: {found}"
    return None


def _assign(swaps: list[tuple[torch.nn.Module, type[torch.nn.Module]]]) -> None:
    """Give each module its class: all or, if one refuses, none."""
    done: list[tuple[torch.nn.Module, type[torch.nn.Module]]] = []
    try:
        for module, cls in swaps:
            before = type(module)
            module.__class__ = cls
            done.append((module, before))
    except BaseException:
        for module, before in done:
            module.__class__ = before
        raise


def _check_module(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {model!r:.80}")


def _named(model: torch.nn.Module, argument: str, names: Iterable[str]) -> set[torch.nn.Module]:
    """The modules that `names` match, with all that they hold."""
    if isinstance(names, str):
        raise TypeError(
            f"{argument} must be several names; got the string {names!r}: put it in [ ]"
        )
    found: set[torch.nn.Module] = set()
    for pattern in names:
        named = [m for name, m in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]
        if not named:
            raise ValueError(
                f"{argument}: {pattern!r} matches no module; names are those of "
                "model.named_modules()"
            )
        for module in named:
            found.update(module.modules())
    return found
