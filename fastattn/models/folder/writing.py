"""Writing a Hugging Face GPT-2 folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastattn.models.folder.layout import CONFIG, GENERATION, HEAD, INDEX, PREFIX, WEIGHTS, layout
from fastattn.models.folder.reading import SPECIAL_TOKENS

if TYPE_CHECKING:
    from fastattn.models.gpt import GPT

SHARD = "model-{:05d}-of-{:05d}.safetensors"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_pretrained(
    model: GPT, folder: str | PathLike[str], *, max_shard_size: int = 5 * 10**9
) -> None:
    """Write a Hugging Face GPT-2 folder, which transformers loads bit for bit.

        model.save_pretrained("folder")
        transformers.GPT2LMHeadModel.from_pretrained("folder")

    Every file is written beside its place under another name and then renamed, so that none is
    ever half there; config.json comes last. Other files in the folder stay, but for the weights of
    a former save.

    Args:
        folder: made if it is not there.
        max_shard_size: bytes of weights in one file; what is more goes into several, with an index.

    Raises:
        ValueError: max_shard_size is not positive.
        OSError: the folder cannot be written; what was there is then as it was.
        ImportError: safetensors is not installed.
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be positive, got {max_shard_size}")
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            'writing weights takes safetensors: pip install "fastattn[hf]"'
        ) from error

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    shards = _shards(_stored_tensors(model), max_shard_size)
    names = [WEIGHTS] if len(shards) == 1 else [
        SHARD.format(number, len(shards)) for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    with _beside(target) as (beside, publish):
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, beside / name, metadata={"format": "pt"})
        if len(shards) > 1:
            names.append(INDEX)
            _write_json(beside / INDEX, _index(names, shards))
        config = _config_json(model)
        _write_json(beside / GENERATION, {name: config[name] for name in SPECIAL_TOKENS})
        _write_json(beside / CONFIG, config)
        publish([*names, GENERATION, CONFIG])
        for stale in target.glob("model*.safetensors*"):
            if OURS.fullmatch(stale.name) and stale.name not in names:
                stale.unlink()


def _stored_tensors(model: GPT) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, how in layout(model.config).items():
        tensor = parameters[name].detach()
        tensor = tensor.t() if how.transposed else tensor
        full_name = how.name if how.name == HEAD else PREFIX + how.name
        tensors[full_name] = tensor.contiguous()
    return tensors


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
            tensor: name for name, shard in zip(names, shards, strict=False) for tensor in shard
        },
    }


def _config_json(model: GPT) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
        **dataclasses.asdict(model.config),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[tuple[Path, Callable[[list[str]], None]]]:
    """A temporary folder inside ``folder``, and a function that moves its files out into it."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        beside = Path(temporary)

        def publish(names: list[str]) -> None:
            for name in names:
                with open(beside / name, "rb") as file:
                    os.fsync(file.fileno())
            for name in names:
                os.replace(beside / name, folder / name)

        yield beside, publish
