"""The folder "model" of a checkpoint, for use: also of a model of which each process has a part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastattn.training.checkpoints import tensors


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write `model` by its own `save_pretrained`, or its `state_dict` as model.safetensors."""
    own: Any = getattr(model, "save_pretrained", None)
    if own is not None:
        own(folder)
        return
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:  # a shared one once
            seen.add(id(value))
            weights[name] = value
    folder.mkdir()
    tensors.save(weights, folder / "model.safetensors")


@contextlib.contextmanager
@torch.no_grad()
def gathered(model: torch.nn.Module, keep: bool) -> Iterator[None]:
    """Inside, the parameters of `model` are whole and on the CPU where processes have parts.

    All processes must enter; those without `keep` do not keep the whole, and may not use the model.
    A parameter at a time is sent. The model does not compute inside.
    """
    whole: dict[int, Tensor] = {}
    former: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for places in both:
            for name, tensor in places.items():
                if not isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in whole:
                    full = tensor.full_tensor()
                    kept = full.cpu() if keep else full.new_empty(0)
                    if isinstance(tensor, torch.nn.Parameter):
                        kept = torch.nn.Parameter(kept, tensor.requires_grad)
                    whole[id(tensor)] = kept
                former.append((places, name, tensor))
    try:
        if keep:
            for places, name, tensor in former:
                places[name] = whole[id(tensor)]
        yield
    finally:
        for places, name, tensor in former:
            places[name] = tensor
