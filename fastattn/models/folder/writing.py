"""Writing a Hugging Face folder of the family that a model is of."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.files import folder_written_beside, local_path
from fastattn.models.families import family_of, family_that_fits
from fastattn.models.folder import rounded
from fastattn.models.folder.layout import CONFIG, GENERATION, INDEX, WEIGHTS
from fastattn.models.folder.reading import SPECIAL_TOKENS
from fastattn.models.folder.weights import weights_of
from fastattn.nn.checks import check_integer
from fastattn.nn.mode import in_mode

SHARD = "model-{:05d}-of-{:05d}.safetensors"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_pretrained(
    model: Any, folder: str | PathLike[str], *, max_shard_size: int = 5 * 10**9
) -> None:
    """Write a Hugging Face folder, which transformers loads bit for bit.

        model.save_pretrained("folder")
        transformers.AutoModelForCausalLM.from_pretrained("folder")

    It is of the family that the model was read as (``model.family``, config.json's "model_type");
    for one that was not read, of the first family that has a place for all that its config says.

    Saved are the weights that the model computes with in eval mode: of parts that `torch.compile`
    or DDP wrap, of parametrised, pruned and sparse parameters. "tie_word_embeddings" in config.json
    says whether head and embedding are one now. Parameters sharded by FSDP2 are gathered: every
    process must call, the first one writes, and all return when that is done.

    The files are written to a temporary folder and then renamed, so that none is ever half there;
    a new folder appears whole, and in another config.json goes first and comes last. Other files
    there stay, but for the weights of a former save.

    A model with weights of fewer bits (`fastattn.compression.quantize`) is written as it is, for
    fastattn; transformers does not read it.

    Args:
        folder: made if it is not there.
        max_shard_size: bytes of weights in one file; what is more goes into several, with an index.

    Raises:
        TypeError: folder is no path, or max_shard_size no integer.
        ValueError: folder is empty, max_shard_size is not positive, or no family has a
            place for the config (the message says for what), or the model is no longer what its
            config says (adapters, quantised or other layers): the message says which part.
        OSError: the folder cannot be written; what was there is then as it was.
        ImportError: safetensors is not installed.
    """
    target = local_path("folder", folder)
    if check_integer("max_shard_size", max_shard_size, otherwise=", in bytes") < 1:
        raise ValueError(f"max_shard_size must be positive, got {max_shard_size}")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "folder must not be a file", str(target))
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            'writing weights takes safetensors: pip install "fastattn[hf]"'
        ) from error

    family = family_that_fits(model.config) if model.family is None else family_of(model.family)
    quantization = rounded.quantization(model)
    with in_mode(model, training=False):
        if quantization is not None:
            weights, tied, sharded = *rounded.weights_of(model), False
        else:
            weights, tied, sharded = weights_of(model, family.of(model.config))
    config = dataclasses.replace(model.config, tie_word_embeddings=tied)
    stored = family.write_config(config)
    if quantization is not None:
        stored["quantization_config"] = quantization
    stored["architectures"] = [family.architecture(type(model))]
    try:
        if not sharded or torch.distributed.get_rank() == 0:
            generation = _generation(model, stored) if "eos_token_id" in family.fields else None
            _write(target, stored, generation, weights, max_shard_size, save_file)
    finally:
        if sharded:
            torch.distributed.barrier()


def _write(
    target: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    weights: dict[str, Tensor],
    max_shard_size: int,
    save_file: Any,
) -> None:
    shards = _shards(weights, max_shard_size)
    names = [WEIGHTS] if len(shards) == 1 else [
        SHARD.format(number, len(shards)) for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    floating = next(tensor for tensor in weights.values() if tensor.is_floating_point())
    dtype = str(floating.dtype).removeprefix("torch.")
    with folder_written_beside(target, CONFIG, lambda name: bool(OURS.fullmatch(name))) as beside:
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, beside / name, metadata={"format": "pt"})
        if len(shards) > 1:
            _write_json(beside / INDEX, _index(names, shards))
        if generation is not None:
            _write_json(beside / GENERATION, generation)
        _write_json(beside / CONFIG, {**config, "dtype": dtype})


def _generation(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: the special tokens, and the settings that the model was read with."""
    tokens = {name: config[name] for name in SPECIAL_TOKENS if name in config}
    settings = model.generation_config
    if settings is None:
        return tokens
    said = {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) is not None
    }
    del said["unsupported"]
    said.pop("logits_processor", None)  # functions
    return {**tokens, **said, **dict(settings.unsupported)}


def _shards(tensors: dict[str, Tensor], max_shard_size: int) -> list[dict[str, Tensor]]:
    """The tensors in order, in as many parts as the size asks; each part has at least one."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _index(names: list[str], shards: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {
        "metadata": {
            "total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())
        },
        "weight_map": {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
