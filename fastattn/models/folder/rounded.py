"""Folders of models whose linear layers have weights of 8 bits (`fastattn.nn.int8_weight`).

    config.json         of the family, with "quantization_config": QUANTIZATION
    model.safetensors   the model's own state_dict; a weight of 8 bits is its table, of uint8

The names are this package's, not the family's: a table has rows of several layers of theirs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.families import Family
from fastattn.models.folder.layout import laid_out, shared_names, skeleton, tensors
from fastattn.models.folder.sources import (
    BYTES,
    DTYPES,
    Source,
    safetensors_sources,
    weight_files,
)
from fastattn.nn.int8_weight import Int8Weight, table_shape

QUANTIZATION = {"quant_method": "fastattn", "bits": 8}


def is_rounded(model: torch.nn.Module) -> bool:
    """Whether a model has weights of 8 bits."""
    return any(isinstance(parameter, Int8Weight) for parameter in model.parameters())


def names(model: torch.nn.Module) -> frozenset[str]:
    """The tensors of the ``state_dict`` that are weights of linear layers."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    return frozenset(name for name, tensor in tensors(model).items() if id(tensor) in matrices)


def weights_of(model: Any) -> tuple[dict[str, Tensor], bool]:
    """The tensors to store, and whether those that config.tie_word_embeddings ties are one.

    Raises ValueError for a model whose parts are no longer those of its config.
    """
    joined = skeleton(type(model), dataclasses.replace(model.config, tie_word_embeddings=True))
    state = model.state_dict(keep_vars=True)
    tied = all(state.get(other) is state.get(name) for other, name in shared_names(joined))
    config = dataclasses.replace(model.config, tie_word_embeddings=tied)
    expected, own = tensors(skeleton(type(model), config)), tensors(model)
    if expected.keys() != own.keys():
        strangers = ", ".join(sorted(expected.keys() ^ own.keys()))
        raise ValueError(
            f"the model is not what its config says: {strangers}. Save a model with weights of 8 "
            "bits without wrappers, adapters or masks"
        )
    stored = {}
    for name, tensor in own.items():
        if tensor.shape != expected[name].shape or hasattr(tensor, "tensor_data_names"):
            raise ValueError(
                f"{name} must be a tensor of {tuple(expected[name].shape)} by the model's config, "
                f"got a {type(tensor).__name__} of {tuple(tensor.shape)}"
            )
        stored[name] = tensor.table if isinstance(tensor, Int8Weight) else tensor.detach()
    return {name: tensor.contiguous() for name, tensor in stored.items()}, tied


def read(
    folder: Path,
    family: Family,
    cls: type,
    config: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The model on the meta device, and its ``state_dict``.

    Raises ValueError for weights that are missing, unexpected, or of another shape or dtype.
    """
    plain = dataclasses.replace(family, prefix="", renamed={}, ignored=None)
    sources = safetensors_sources(folder, plain, weight_files(folder))
    for key in family.depths.values():
        field = family.fields[key]
        count = getattr(config, field if isinstance(field, str) else field[0])
        if count > len(sources):  # before so many are laid out
            raise ValueError(
                f'{folder}: "{key}" of config.json is {count}, and there are {len(sources)} weights'
            )
    model = laid_out(folder, cls, config)
    expected, matrices = tensors(model), names(model)
    wrong = [f"{name} is missing" for name in expected if name not in sources]
    wrong += [f"{name} is unexpected" for name in sorted(sources) if name not in expected]
    for name in expected.keys() & sources.keys():
        shape, found = tuple(expected[name].shape), sources[name]
        is_table = found.dtype == BYTES and name in matrices
        if is_table:
            shape = table_shape(*shape)
        if found.shape != shape or not (is_table or found.dtype in DTYPES):
            wrong.append(f"{name} must have the shape {shape}, got {found.shape} of {found.dtype}")
    if wrong:
        raise ValueError(
            f"{folder}: the weights are not those of the 8-bit {family.title} that config.json "
            "describes:\n  " + "\n  ".join(wrong)
        )
    if dtype is None:
        dtype = _dtype(sources)

    def weight(name: str) -> Tensor:
        tensor = sources[name].tensor()
        if sources[name].dtype == BYTES:
            return Int8Weight(tensor.to(device), tuple(expected[name].shape), dtype)
        return tensor.to(device, dtype)

    weights = {name: weight(name) for name in expected}
    for other, first in shared_names(model):
        weights[other] = weights[first]
    return model, weights


def _dtype(sources: dict[str, Source]) -> torch.dtype:
    """Of what is not rounded; a model has norms."""
    return next(DTYPES[source.dtype] for source in sources.values() if source.dtype != BYTES)
