"""Folders of models whose linear layers have weights of fewer bits.

    config.json         of the family, with "quantization_config": QUANTIZATION, or with "mode" in
                        place of "bits", where weights are torchao's
    model.safetensors   the model's own state_dict. An `Int8Weight` is its table, of uint8; a weight
                        of torchao the bytes of its plain tensors, NAME:PART

The names are this package's, not the family's: a table has rows of several layers of theirs.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.families import Family
from fastattn.models.folder.layout import CONFIG, laid_out, shared_names, skeleton, tensors
from fastattn.models.folder.sources import (
    BYTES,
    DTYPES,
    Source,
    read_json,
    safetensors_sources,
    weight_files,
)
from fastattn.nn.int8_weight import Int8Weight, table_shape
from fastattn.nn.torchao_weight import MODES, empty, is_torchaos, mode_of, parts

QUANTIZATION = {"quant_method": "fastattn", "bits": 8}


def is_rounded(model: torch.nn.Module) -> bool:
    """Whether a model has weights of 8 bits of this package."""
    return any(isinstance(parameter, Int8Weight) for parameter in model.parameters())


def quantization(model: torch.nn.Module) -> dict[str, Any] | None:
    """The "quantization_config" of a model; None where no weight has fewer bits.

    Raises ValueError for weights of torchao that no mode of ours makes, or several.
    """
    torchaos = {name: p for name, p in model.named_parameters() if is_torchaos(p)}
    if not torchaos:
        return QUANTIZATION if is_rounded(model) else None
    modes = {name: mode_of(parameter) for name, parameter in torchaos.items()}
    first = next(iter(modes))
    for name, mode in modes.items():
        if mode is None or mode != modes[first]:
            raise ValueError(
                f"{name} is a {type(torchaos[name]).__name__} that cannot be saved: a folder has "
                "the weights of one mode of fastattn.compression.quantize, made on this kind of "
                "device. Save the model before it is quantised"
            )
    return {"quant_method": "fastattn", "mode": modes[first]}


def is_known(config: Any) -> bool:
    """Whether a "quantization_config" is one of `quantization`."""
    return config == QUANTIZATION or config in [
        {"quant_method": "fastattn", "mode": mode} for mode in MODES
    ]


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
            f"the model is not what its config says: {strangers}. Save a model with weights of "
            "fewer bits without wrappers, adapters or masks"
        )
    stored = {}
    for name, tensor in own.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} must be a tensor of {tuple(expected[name].shape)} by the model's config, "
                f"got a {type(tensor).__name__} of {tuple(tensor.shape)}"
            )
        if is_torchaos(tensor):
            for part, plain in parts(tensor).items():
                stored[f"{name}:{part}"] = plain.contiguous().flatten().view(torch.uint8)
        else:
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
    """The model on the meta device, and its weights.

    Raises:
        ValueError: weights are missing, unexpected, or of another shape or dtype; or torchao's are
            asked for in another dtype or for another kind of device than they were made for.
        ImportError: the weights are torchao's, which is not installed.
    """
    mode = read_json(folder / CONFIG)["quantization_config"].get("mode")
    plain = dataclasses.replace(family, prefix="", renamed={}, ignored=None)
    sources = safetensors_sources(folder, plain, weight_files(folder))
    for key in family.depths.values():
        if (count := family.depth(config, key)) > len(sources):  # before so many are laid out
            raise ValueError(
                f'{folder}: "{key}" of config.json is {count}, and there are {len(sources)} weights'
            )
    model = laid_out(folder, cls, config)
    expected, matrices = tensors(model), names(model)
    divided: dict[str, dict[str, Source]] = {}  # the parts of torchao's weights
    for name in sources if mode is not None else ():
        whole, colon, part = name.partition(":")
        if colon and whole in matrices:
            divided.setdefault(whole, {})[part] = sources[name]
    there = {*divided, *(name for name in sources if name.partition(":")[0] not in divided)}
    wrong = [f"{name} is missing" for name in expected if name not in there]
    wrong += [f"{name} is unexpected" for name in sorted(there) if name not in expected]
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
    found_dtype = _dtype(sources)
    if divided and dtype not in (None, found_dtype):
        raise ValueError(
            f"{folder}: its weights of {mode} were made for {found_dtype}; got dtype {dtype}"
        )
    dtype = found_dtype if dtype is None else dtype

    def weight(name: str) -> Tensor:
        if name in divided:
            place = torch.empty(0, device=device).device
            return _assembled(
                f"{folder}: {name}", mode, expected[name], dtype, place, divided[name]
            )
        tensor = sources[name].tensor()
        if sources[name].dtype == BYTES:
            return Int8Weight(tensor.to(device), tuple(expected[name].shape), dtype)
        return tensor.to(device, dtype)

    return model, {name: weight(name) for name in expected}


def _assembled(
    title: str,
    mode: str,
    like: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    sources: dict[str, Source],
) -> Tensor:
    """A weight of torchao from the bytes of its parts."""
    if like.numel() > 2 * max(math.prod(source.shape) for source in sources.values()):
        raise ValueError(f"{title} has too few bytes for the shape {tuple(like.shape)}")
    made = empty(mode, like.shape, dtype, device)
    places = parts(made)
    bytes_of = {name: (place.nbytes,) for name, place in places.items()}
    found = {name: source.shape for name, source in sources.items()}
    if bytes_of != found or any(source.dtype != BYTES for source in sources.values()):
        raise ValueError(
            f"{title} must have the parts {bytes_of} of bytes, got {found}: damaged, or made on "
            f"another kind of device than {device.type}, or by another version of torchao"
        )
    for name, place in places.items():
        stored = sources[name].tensor().clone().view(place.dtype).view(place.shape)
        place.copy_(stored)
    return made


def _dtype(sources: dict[str, Source]) -> torch.dtype:
    """Of what is not rounded; a model has norms."""
    return next(DTYPES[source.dtype] for source in sources.values() if source.dtype != BYTES)
