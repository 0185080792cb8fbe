"""Weights of fewer bits that are torchao's: how each mode makes one, and the plain tensors in it.

A weight is a tensor subclass around a few plain ones, whose sizes and dtypes follow from the mode,
the weight's shape and dtype, and the kind of device. So it is written as its plain tensors, and
read into a new one of the same mode: no word of a file says which class is made, or of what size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

MODES = ("int8-dynamic", "int4", "fp8")
OPTIONAL = "optional_tensor_attribute_names"  # of torchao's classes
GROUP = 32  # of int4: the one that divides the most sizes


def quantise(layer: torch.nn.Module, mode: str) -> None:
    """Give a `torch.nn.Linear` a weight of a mode, in place; raises what torchao raises."""
    weight: Any = layer.weight
    torchao = _torchao()
    torchao.quantize_(layer, _config(torchao, mode, weight.device), filter_fn=_everything)


def is_torchaos(tensor: Any) -> bool:
    return hasattr(tensor, "tensor_data_names")


def parts(weight: Any) -> dict[str, Tensor]:
    """The plain tensors in a weight, by their names there."""
    names = (*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ()))
    found = {name: getattr(weight, name) for name in names}
    return {name: part for name, part in found.items() if part is not None}


def empty(mode: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight of a mode, whose numbers say nothing; raises what torchao raises."""
    layer = torch.nn.utils.skip_init(torch.nn.Linear, shape[1], shape[0], False, dtype=dtype)
    layer.weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    quantise(layer, mode)
    weight: Tensor = layer.weight.detach()
    return weight


def mode_of(weight: Tensor) -> str | None:
    """The mode that makes such a weight; None for one that was made in another way."""
    return _mode_of(_form(weight), weight.shape, weight.dtype, weight.device)


@functools.cache
def _mode_of(
    form: object, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> str | None:
    for mode in MODES:
        try:
            if _form(empty(mode, shape, dtype, device)) == form:
                return mode
        except Exception:  # of many kinds: what this mode cannot do here
            continue
    return None


def _form(weight: Any) -> tuple[object, ...]:
    """All of a weight but its numbers."""
    plain = tuple((name, part.shape, part.dtype) for name, part in parts(weight).items())
    names = (*weight.tensor_attribute_names, *getattr(weight, OPTIONAL, ()))
    said = tuple((name, str(getattr(weight, name, None))) for name in names)
    return type(weight), plain, said


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError(
            'weights of torchao need the package torchao: pip install "fastattn[compress]"'
        ) from error
    return torchao.quantization


def _config(torchao: Any, mode: str, device: torch.device) -> Any:
    if mode == "int8-dynamic":
        return torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if mode == "fp8":
        return torchao.Float8WeightOnlyConfig(set_inductor_config=False)
    if device.type == "cpu":  # the kernel that torch brings for it
        from torchao.prototype.quantization import int4

        return int4.PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    return torchao.Int4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def _everything(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear)
