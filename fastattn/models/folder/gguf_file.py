"""Reading a GGUF file, as llama.cpp has them: one file with the config and quantised weights.

The weights are dequantised one by one as they are read (by the package `gguf`), to float32. The
tokenizer in the file is not looked at: transformers reads it.
"""

from __future__ import annotations

import errno
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.families import FAMILIES, Family
from fastattn.models.families.family import GGUF
from fastattn.models.folder.gguf_lengths import check_lengths
from fastattn.models.folder.sources import Source

# Keys beside the architecture's own that say something of the model.
TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def read_gguf(path: Path) -> tuple[Family, Any, dict[str, Source]]:
    """The family, our config, and the tensors by their names in a folder of the family.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of a family or with options that are not read.
        ImportError: the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            'reading a GGUF file takes the package gguf: pip install "fastattn[gguf]"'
        ) from error
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such GGUF file", str(path))
    try:
        check_lengths(path)
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if _is_config(key)}
    except Exception as error:  # of many kinds: the reader takes the file at its word
        raise ValueError(f"{path}: damaged, or not a GGUF file ({error})") from error
    family, how = _family(path, fields.pop("general.architecture", None))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    data = {"model_type": family.model_type, "tie_word_embeddings": "output.weight" not in tensors}
    for key, value in fields.items():
        name = TOKENS.get(key) or how.keys.get(key.removeprefix(f"{family.model_type}."))
        if name is None:
            raise ValueError(f"{path}: {key!r} is {value!r}, which {family.title} does not have")
        data[name] = value
    try:
        config = family.read_config(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    sources: dict[str, Source] = {}
    for tensor in reader.tensors:
        name = how.stored(tensor.name)
        read = functools.partial(_dequantised, path, tensor, gguf)
        if (heads := how.permuted(name, config)) is not None:
            read = functools.partial(_unpermuted, read, heads)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        sources[family.short(name)] = Source(path, shape, "F32", read)
    return family, config, sources


def _is_config(key: str) -> bool:
    return (
        key in TOKENS
        or not key.startswith(("GGUF.", "tokenizer.", "general."))
        or (key == "general.architecture")
    )


def _family(path: Path, architecture: Any) -> tuple[Family, GGUF]:
    known = {family.model_type: (family, family.gguf) for family in FAMILIES.values()}
    family, how = known.get(architecture, (None, None))
    if family is None or how is None:
        names = ", ".join(repr(kind) for kind, (_, how) in known.items() if how is not None)
        raise ValueError(
            f'{path}: "general.architecture" must be {names}, got {architecture!r}. transformers '
            "reads others, and fastattn.accelerate speeds them up"
        )
    return family, how


def _dequantised(path: Path, tensor: Any, gguf: Any) -> Tensor:
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ValueError(
            f"{path}: {tensor.name} has the type {kind}, which gguf cannot read"
        ) from (error)
    if not values.flags.writeable:  # float32, in the file itself
        values = values.copy()
    return torch.from_numpy(values)


def _unpermuted(read: Any, heads: int) -> Tensor:
    """The rows of q or k from llama.cpp's order, pairs (2c, 2c + 1), to pairs (c, c + D / 2)."""
    weight: Tensor = read()
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
