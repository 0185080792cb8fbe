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

A class is known if it has a `Recogniser` (torch_nn.py, huggingface/gpt2.py): the class with our
forward, when it may be used, and how to call such a module for the proof (see `proof.py`) that
comes before every swap.
"""

from __future__ import annotations

import copyreg
import fnmatch
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastattn.integrations import torch_nn
from fastattn.integrations.proof import Draw, configuration, disproof
from fastattn.integrations.recogniser import Recogniser
from fastattn.integrations.report import Entry, Report
from fastattn.nn.plain import COMPUTING_WEIGHTS

ALREADY = "already runs on fastattn"
UNKNOWN = "fastattn has nothing for this class"


class Swapped:
    """What all classes that `accelerate` makes have in common."""

    _fastattn_original: ClassVar[type[torch.nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so a pickle names the original one, and makes it again.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        constructor, args, *rest = reduced
        newobj = copyreg.__newobj__  # type: ignore[attr-defined]
        if constructor is newobj and args[0] is replacement(self._fastattn_original):
            return _new, (self._fastattn_original, *args[1:]), *rest
        return reduced


def _new(original: type[torch.nn.Module], *args: Any) -> torch.nn.Module:
    cls = replacement(original)
    return cls.__new__(cls, *args)


def _recogniser(cls: type) -> Recogniser | None:
    """The one of exactly this class, None if there is none."""
    if cls.__module__.startswith("transformers.models.gpt2."):
        from fastattn.integrations.huggingface import gpt2  # transformers is optional

        return gpt2.RECOGNISERS.get(cls)
    return torch_nn.RECOGNISERS.get(cls)


_replacements: dict[type, type[torch.nn.Module]] = {}  # made so far, by original class


def replacement(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class that instances of `original`, a known class, are swapped to."""
    if original in _replacements:
        return _replacements[original]
    recogniser = _recogniser(original)
    if recogniser is None:
        raise TypeError(f"fastattn has no replacement for the class {original.__qualname__}")
    mixin = recogniser.mixin
    bases = (Swapped, mixin) if issubclass(mixin, original) else (Swapped, mixin, original)
    namespace = {
        "_fastattn_original": original,
        "__module__": mixin.__module__,
        "__doc__": f"{original.__name__} on fastattn; fastattn.restore(model) turns it back.",
    }
    _replacements[original] = type(f"Fast{original.__name__}", bases, namespace)
    return _replacements[original]


def _original_of(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that `accelerate` took `module` from, None if it is not swapped."""
    return type(module)._fastattn_original if isinstance(module, Swapped) else None


@dataclass(frozen=True)
class _Unit:
    """A module that a report lists; `cls` is its class before any swap."""

    name: str
    module: torch.nn.Module
    cls: type[torch.nn.Module]
    recogniser: Recogniser | None

    def entry(self, backend: str | None = None, reason: str | None = None) -> Entry:
        return Entry(self.name, self.cls.__name__, backend, reason)


def _units(model: torch.nn.Module) -> Iterator[_Unit]:
    """The known modules, and all others that are neither containers nor parts of those."""
    parts: set[torch.nn.Module] = set()
    for name, module in model.named_modules():
        cls = _original_of(module) or type(module)
        recogniser = _recogniser(cls)
        if recogniser is not None or _unknown(cls) != UNKNOWN:
            parts.update(module.children())
        elif module in parts:
            parts.update(module.children())
            continue
        elif module._modules and not module._parameters and not module._buffers:
            continue
        yield _Unit(name, module, cls, recogniser)


def accelerate(model: torch.nn.Module, *, exclude: Iterable[str] = ()) -> Report:
    """Run the modules of `model` that fastattn knows on fastattn, in place.

    Known are `torch.nn.LayerNorm` and `RMSNorm` in any model, and attention and MLP of Hugging
    Face's GPT-2. Every distinct configuration is first proven by a probe: ours against the
    original on random input, outputs and gradients, no less exact against float64. What fails, and
    what cannot be swapped (quantised, sharded, offloaded, subclassed, not yet loaded), is left
    alone with the reason in the report.

    Weights are shared, not copied; `state_dict`, `save_pretrained`, hooks, names, optimisers and
    `isinstance` are as before. Calling it twice is harmless: the second report says "already".
    All modules are swapped together after the last proof: an error leaves the model as it was.

    Hooks that our forward would pass by (on a projection inside an MLP) and wrappers put there
    later (LoRA) are seen at each call: such a module runs its original forward.

    Args:
        model: any `torch.nn.Module`, on any device, in any floating-point dtype.
        exclude: names of modules to leave alone with all that they hold, as in
            `model.named_modules()`; a name may have wildcards (`"transformer.h.*.mlp"`).

    Returns:
        A `Report`: `swapped` and `left`, and a table as its `str()`.

    Raises:
        TypeError: `model` is no module, or `exclude` is a single string.
        ValueError: a name in `exclude` matches no module.
    """
    _check_module(model)
    excluded = _excluded(model, exclude)
    examine = _Examiner(model)
    swaps: list[tuple[torch.nn.Module, type[torch.nn.Module]]] = []
    swapped: list[Entry] = []
    left: list[Entry] = []
    for unit in _units(model):
        backend = None
        if unit.recogniser is None:
            reason: str | None = _unknown(unit.cls)
        elif isinstance(unit.module, Swapped):
            reason = ALREADY
        elif unit.module in excluded:
            reason = "excluded by the caller"
        else:
            reason = _unfit(unit.module) or unit.recogniser.refusal(unit.module)
            if reason is None:
                reason, backend = examine(unit.module, unit.cls, unit.recogniser)
        if reason is not None:
            left.append(unit.entry(reason=reason))
        else:
            swaps.append((unit.module, replacement(unit.cls)))
            swapped.append(unit.entry(backend=backend))
    _assign(swaps)
    return Report(tuple(swapped), tuple(left))


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
        if type(module) is not replacement(original):
            raise RuntimeError(
                f"module {name!r} was accelerated and has then been made a {type(module).__name__} "
                "by another tool: undo that first, then restore"
            )
        swaps.append((module, original))
    _assign(swaps)


def verify(model: torch.nn.Module) -> Report:
    """Prove every swapped module of `model` anew, as it is now.

    Worth a call when the dtype or the device has changed since `accelerate`, or after unpickling in
    another environment. The model itself is neither run nor changed.

    Returns:
        A `Report`: `swapped` are the modules proven, `left` are all others; among them those that
        were swapped but run their original forward at present, with the reason (a hook on a
        projection, an adapter, another attention implementation in the config).

    Raises:
        TypeError: `model` is no module.
        RuntimeError: a module fails its proof; the message names each and the deviation.
    """
    _check_module(model)
    examine = _Examiner(model)
    proven: list[Entry] = []
    left: list[Entry] = []
    failed: list[str] = []
    for unit in _units(model):
        if unit.recogniser is None:
            left.append(unit.entry(reason=_unknown(unit.cls)))
        elif not isinstance(unit.module, Swapped):
            left.append(unit.entry(reason="not accelerated"))
        elif (reason := _unfit(unit.module)) is not None:
            left.append(unit.entry(reason=f"cannot be probed: {reason}"))
        elif (reason := unit.recogniser.refusal(unit.module)) is not None:
            left.append(unit.entry(reason=f"runs as the original: {reason}"))
        else:
            reason, backend = examine(unit.module, unit.cls, unit.recogniser)
            if reason is None:
                proven.append(unit.entry(backend=backend))
            else:
                failed.append(f"{unit.name} ({unit.cls.__name__}): {reason}")
    if failed:
        raise RuntimeError(
            "these modules do not compute what their original class computes; "
            "fastattn.restore(model) turns them back:\n  " + "\n  ".join(failed)
        )
    return Report(tuple(proven), tuple(left))


class _Examiner:
    """Proofs of one run over a model, one for each distinct configuration of a module."""

    def __init__(self, model: torch.nn.Module) -> None:
        # For modules without weights of their own.
        self._default = _kind(model) or (torch.get_default_dtype(), torch.device("cpu"))
        self._findings: dict[Hashable, tuple[str | None, str | None]] = {}

    def __call__(
        self, module: torch.nn.Module, original: type[torch.nn.Module], recogniser: Recogniser
    ) -> tuple[str | None, str | None]:
        """(None, the backend that runs it) if it is proven, else (the reason, None)."""
        key = configuration(module)
        if key not in self._findings:
            dtype, device = _kind(module) or self._default
            reason = disproof(
                module, original, replacement(original), recogniser.probes, Draw(dtype, device)
            )
            backend = None
            if reason is None:
                with torch.inference_mode(False), torch.enable_grad():
                    probe = recogniser.probes(module, Draw(dtype, device))[0]
                    backend = recogniser.backend(module, probe)
            self._findings[key] = reason, backend
        return self._findings[key]


def _kind(module: torch.nn.Module) -> tuple[torch.dtype, torch.device] | None:
    """dtype and device of the first floating-point parameter."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return None


def _unknown(cls: type[torch.nn.Module]) -> str:
    """Why a class without a recogniser is left alone."""
    if cls.__module__.partition(".")[0] == "fastattn":
        return ALREADY
    for base in cls.__mro__[1:]:
        if _recogniser(base) is not None:
            return f"a subclass of {base.__name__}, whose forward may differ"
    return UNKNOWN


def _unfit(module: torch.nn.Module) -> str | None:
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


def _excluded(model: torch.nn.Module, exclude: Iterable[str]) -> set[torch.nn.Module]:
    """The modules that `exclude` names, with all that they hold."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be several names; got the string {exclude!r}: put it in [ ]")
    found: set[torch.nn.Module] = set()
    for pattern in exclude:
        named = [m for name, m in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]
        if not named:
            raise ValueError(
                f"exclude: {pattern!r} matches no module; names are those of model.named_modules()"
            )
        for module in named:
            found.update(module.modules())
    return found
