"""Weights of fewer bits in a model that is there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from fastattn.nn.checks import check_choice
from fastattn.nn.int8_weight import Int8Weight, round_linear_layers, why_not_rounded
from fastattn.nn.torchao_weight import GROUP, is_torchaos, parts, quantise
from fastattn.nn.torchao_weight import MODES as TORCHAOS
from fastattn.training.optional import require

MODES = ("int8", *TORCHAOS)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `quantize` did; ``print(report)`` shows it.

    Attributes:
        mode: as it was asked for.
        quantised: names of the modules whose weight has fewer bits now.
        left: name -> why, of the other modules that have a matrix.
        before, after: bytes of all parameters and buffers, a shared one once.
    """

    mode: str
    quantised: tuple[str, ...]
    left: dict[str, str]
    before: int
    after: int

    def __str__(self) -> str:
        megabytes = f"{self.before / 1e6:.1f} MB -> {self.after / 1e6:.1f} MB"
        lines = [f"{self.mode}: {len(self.quantised)} weights quantised, {megabytes}"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            lines.append(f"left alone: {', '.join(names[:2])}{more}: {reason}")
        return "\n".join(lines)


@torch.no_grad()
def quantize(model: torch.nn.Module, mode: str = "int8") -> Report:
    """Give the linear layers of a model weights of fewer bits, in place.

        print(quantize(model, "int8"))

    The modes:

        "int8"           weights of 8 bits (`fastattn.nn.int8_weight.Int8Weight`), on any device;
                         fast for single rows on an x86 processor; can be saved and loaded
        "int8-dynamic"   8 bits a weight, and x rounded to 8 bits row by row: torchao
        "int4"           4 bits in groups of 32: torchao; a CPU takes a bfloat16 model
        "fp8"            float8_e4m3fn weights: torchao

    Any model does: of this package, of transformers, and one that `fastattn.accelerate` has
    swapped. A layer that the mode cannot do here stays as it is, and the report says why; so does
    one whose weight is another module's too, but for "int8", which rounds an embedding that is tied
    to the head as well.

    Raises:
        TypeError: model is no module.
        ValueError: an unknown mode, or no layer at all could be quantised; the message says why.
        ImportError: the mode is torchao's, which is not installed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("mode", mode, MODES)
    before = size(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    left = {
        name: "no linear layer: a step reads few of its rows, or it is no product"
        for name, module in model.named_modules()
        if name not in layers and _has_matrix(module)
    }
    left |= {n: why for n, layer in layers.items() if (why := why_not_rounded(layer)) is not None}
    if mode == "int8":
        round_linear_layers(model)
    else:
        left |= _with_torchao(model, mode, {n: m for n, m in layers.items() if n not in left})
    quantised = tuple(name for name in layers if name not in left)
    if not quantised:
        reasons = "; ".join(dict.fromkeys(left.values())) or "it has no torch.nn.Linear"
        raise ValueError(f"no layer of the model can be quantised to {mode}: {reasons}")
    left = {name: why for name, why in left.items() if not _is_rounded(model, name)}
    return Report(mode, quantised, left, before, size(model))


def size(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, as they are in memory; a shared one once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Any) -> int:
    if isinstance(tensor, Int8Weight):
        return tensor.bytes
    plain = parts(tensor).values() if is_torchaos(tensor) else [tensor]
    return sum(int(part.nbytes) for part in plain)


def _has_matrix(module: torch.nn.Module) -> bool:
    return any(p is not None and p.dim() > 1 for p in module._parameters.values())


def _is_rounded(model: torch.nn.Module, name: str) -> bool:
    return any(isinstance(p, Int8Weight) for p in model.get_submodule(name).parameters(False))


def _with_torchao(
    model: torch.nn.Module, mode: str, layers: dict[str, torch.nn.Module]
) -> dict[str, str]:
    """Quantise by torchao; the layers that stay, and why."""
    require("torchao.quantization", "compress", f"quantising to {mode}")
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    left: dict[str, str] = {}
    possible = functools.cache(functools.partial(_trial, mode))
    for name, layer in layers.items():
        weight: Any = layer.weight
        if owners[id(weight)] > 1:
            left[name] = "its weight is shared with another module (an embedding tied to the head)"
        elif why := possible(tuple(weight.shape), weight.dtype, weight.device):
            left[name] = why
        else:
            quantise(layer, mode)
    return left


def _trial(
    mode: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a layer of these sizes cannot be quantised: one is, and called; None if it can."""
    if mode == "int4" and shape[1] % GROUP:
        return f"{shape[1]} input features are no multiple of {GROUP}"
    if mode == "int4" and device.type == "cpu" and dtype != torch.bfloat16:
        return f"int4 on a CPU takes bfloat16, not {dtype}: call model.bfloat16() first"
    layer = torch.nn.Linear(shape[1], shape[0], False, device=device, dtype=dtype)
    before: Callable[..., Any] | torch.Tensor = layer.weight
    try:
        quantise(layer, mode)
        layer(torch.zeros(2, shape[1], device=device, dtype=dtype))
    except Exception as error:  # of many kinds: assertions, missing kernels, missing packages
        text = str(error).strip().splitlines()
        return f"torchao cannot do it here ({type(error).__name__}: {text[0] if text else ''})"
    return "torchao leaves layers of its sizes alone" if layer.weight is before else None
