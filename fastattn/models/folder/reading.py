"""Reading a Hugging Face folder of any family that is known.

Nothing is made before all is checked, from the names and shapes in the files' headers.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.files import local_path
from fastattn.generation import GenerationConfig
from fastattn.models.families import Family, family_of
from fastattn.models.folder import rounded
from fastattn.models.folder.gguf_file import read_gguf
from fastattn.models.folder.layout import (
    CONFIG,
    GENERATION,
    INDEX,
    WEIGHTS,
    Stored,
    Weights,
    laid_out,
    layout,
    shared_names,
    stored_name,
)
from fastattn.models.folder.sources import (
    DTYPES,
    Source,
    read_json,
    safetensors_sources,
    weight_files,
)
from fastattn.nn.int8_weight import Int8Weight

# All that is downloaded: pickle files may hold code, and are not even fetched.
DOWNLOADED = [CONFIG, GENERATION, WEIGHTS, INDEX, "model-*-of-*.safetensors"]

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def described(
    cls: Any,
    path: str | PathLike[str],
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    int8: bool = False,
) -> tuple[Family, Any, Weights, GenerationConfig | None]:
    """The family, the model on the meta device, its weights, of which only the names and shapes
    have been read and checked, and how the folder would have it generate.

    ``cls`` is the class of the model; other arguments and errors are those of
    `Pretrained.from_pretrained`.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}"
        )
    where = gguf_path(path, gguf_file, revision)
    if where is not None:
        family, config, sources = read_gguf(where)
    else:
        where = local_folder(path, revision, DOWNLOADED)
        family, config = read_config(where / CONFIG)
    if not issubclass(cls.config_class, family.config_class):
        raise ValueError(
            f"{where}: {family.title} is no {cls.__name__}: fastattn.models.load reads it"
        )
    settings = None
    if where.is_dir():
        if (where / GENERATION).exists() and "eos_token_id" in family.fields:
            settings = GenerationConfig.from_folder(where)
        if read_json(where / CONFIG).get("quantization_config"):
            model, weights = rounded.read(where, family, cls, config, dtype, device)
            return family, model, lambda: iter(weights.items()), settings
        sources = safetensors_sources(where, family, weight_files(where))
    config = _with_head(family, config, sources)
    family = family.of(config)
    _check_layers(where, family, config, sources)
    model = laid_out(where, cls, config)
    return family, model, _weights(where, family, model, sources, dtype, device, int8), settings


def gguf_path(
    path: str | PathLike[str], gguf_file: str | None, revision: str | None
) -> Path | None:
    """The GGUF file that is asked for: ``gguf_file`` in the folder ``path``, or ``path`` itself."""
    if gguf_file is None:
        file = Path(path) if isinstance(path, (str, PathLike)) else Path()
        return local_path("path", path) if file.suffix == ".gguf" else None
    if not isinstance(gguf_file, str) or Path(gguf_file).name != gguf_file:
        raise ValueError(f"gguf_file must be the name of a file in the folder, got {gguf_file!r}")
    return local_folder(path, revision, [gguf_file]) / gguf_file


def read_config(path: Path) -> tuple[Family, Any]:
    """The family and our config of a config.json; ValueError, naming the file, for any other.

    The special tokens are those of a generation_config.json beside it, if there is one, even where
    it does not name them: by them transformers generates.
    """
    data = read_json(path)
    if rounded.is_known(data.get("quantization_config")):
        del data["quantization_config"]
    try:
        family = family_of(data.get("model_type"))
        config = family.read_config(data)
    except (TypeError, ValueError, ArithmeticError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    beside = path.with_name(GENERATION)
    if not beside.exists() or "eos_token_id" not in family.fields:
        return family, config
    data = read_json(beside)
    tokens: dict[str, Any] = {
        name: data.get(name) for name in SPECIAL_TOKENS if name in family.fields
    }
    try:
        return family, dataclasses.replace(config, **tokens)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{beside}: {error}") from error


def _weights(
    folder: Path,
    family: Family,
    model: torch.nn.Module,
    sources: dict[str, Source],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    int8: bool,
) -> Weights:
    """The tensors of ``model``, each read when it is asked for; one of several names once."""
    eight_bits = rounded.names(model) if int8 else frozenset()
    entries = layout(model, family)
    same = _same_tensors(model, family, entries)
    _check_tensors(folder, family, entries, same, sources)
    names = [family.short(name) for entry in entries for name in entry.names]
    needed = [sources[name] for name in names if name in sources]
    dtype = _one_dtype(folder, needed) if dtype is None else dtype
    for other, first in same.items():
        if other in sources and not torch.equal(sources[other].tensor(), sources[first].tensor()):
            raise ValueError(
                f"{folder}: {other} differs from {first}, although config.json ties them; to keep "
                'both set "tie_word_embeddings": false there'
            )

    def each() -> Iterator[tuple[str, Tensor]]:
        for entry in entries:
            for name, weight in _read(entry, family, sources, dtype, device).items():
                yield name, Int8Weight.rounded(weight) if name in eight_bits else weight

    return each


def _read(
    entry: Stored,
    family: Family,
    sources: dict[str, Source],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Our tensors of an entry, without a copy where they are as they are stored."""
    parts = [
        sources[name].tensor() if name in sources else torch.zeros(shape)
        for name, shape in zip(map(family.short, entry.names), entry.shapes, strict=True)
    ]
    if entry.transposed:
        parts = [part.t() for part in parts]
    if len(entry.ours) > 1:
        return {
            name: torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
            for name, part in zip(entry.ours, parts[0].split(entry.rows), strict=True)
        }
    if len(parts) == 1:
        return {entry.ours[0]: parts[0].to(device, dtype).contiguous()}
    rows = sum(len(part) for part in parts)
    whole = torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=device)
    for place, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
        place.copy_(part)
    return {entry.ours[0]: whole}


def _same_tensors(model: torch.nn.Module, family: Family, entries: list[Stored]) -> dict[str, str]:
    """Stored names, without the prefix, that may be there for a tensor of another name."""
    stored = {entry.ours[0]: entry.names[0] for entry in entries}
    same = {
        family.short(other): family.short(stored[first])
        for ours, first in shared_names(model)
        if (other := stored_name(family, ours)) is not None
    }
    return same | {family.short(a): family.short(b) for a, b in family.aliases.items()}


def local_folder(
    path: str | PathLike[str], revision: str | None, files: list[str] = DOWNLOADED
) -> Path:
    """The local folder of ``path``; the ``files`` of a repository of that name are downloaded."""
    if not isinstance(path, (str, PathLike)):
        raise TypeError(
            f"path must be a folder or the name of a repository, got {type(path).__name__}"
        )
    folder = local_path("path", path)
    if folder.is_dir():
        return folder
    name = os.fspath(path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or folder.exists():
        raise FileNotFoundError(
            errno.ENOENT, "path must be a folder or the name of a repository on the Hub", name
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no folder here, and downloading it takes huggingface_hub: "
            'pip install "fastattn[hf]"'
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
        )
    except Exception as error:  # of many kinds, the HTTP client's own among them
        raise FileNotFoundError(
            errno.ENOENT,
            "no such folder here, and the Hugging Face Hub did not give a repository of this name "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            name,
        ) from error


def _with_head(family: Family, config: Any, sources: dict[str, Source]) -> Any:
    """The config as the files say it where they decide whether the head is tied."""
    if family.own_head is None:
        return config
    head, embedding = map(sources.get, family.own_head)
    tied = head is None or (
        config.tie_word_embeddings
        and embedding is not None
        and torch.equal(head.tensor(), embedding.tensor())
    )
    return dataclasses.replace(config, tie_word_embeddings=tied)


def _check_layers(folder: Path, family: Family, config: Any, sources: dict[str, Source]) -> None:
    """Raise unless config and weights agree on the layers, before so many are laid out."""
    for beginning, key in family.depths.items():
        pattern = re.compile(re.escape(beginning) + r"(\d+)\.")
        layers = {match[1] for name in sources if (match := pattern.match(name))}
        if (count := family.depth(config, key)) != len(layers):
            raise ValueError(
                f'{folder}: "{key}" of config.json is {count}, but the weights have {len(layers)} '
                "layers"
            )


def _check_tensors(
    folder: Path,
    family: Family,
    entries: list[Stored],
    same: dict[str, str],
    sources: dict[str, Source],
) -> None:
    """Raise one error that lists every tensor that is missing, unexpected or of another shape."""
    expected = {
        family.short(name): shape
        for entry in entries
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    expected |= {
        other: expected[first]
        for other, first in same.items()
        if other in sources and first in expected
    }
    needed = expected.keys() - family.zeros
    wrong = [f"{name} is missing" for name in expected if name in needed and name not in sources]
    wrong += [
        f"{name} is unexpected"
        for name in sorted(sources)
        if name not in expected and not (family.spare and family.spare.fullmatch(name))
    ]
    for name, shape in expected.items():
        if name in sources:
            source = sources[name]
            if source.shape != shape:
                wrong.append(f"{name} must have the shape {shape}, got {source.shape}")
            if source.dtype not in DTYPES:
                wrong.append(f"{name} must be one of {', '.join(DTYPES)}, got {source.dtype}")
    if wrong:
        raise ValueError(
            f"{folder}: the weights are not those of the {family.title} that config.json "
            "describes:\n  " + "\n  ".join(wrong)
        )


def _one_dtype(folder: Path, sources: list[Source]) -> torch.dtype:
    dtypes = sorted({source.dtype for source in sources})
    if len(dtypes) > 1:
        raise ValueError(
            f"{folder}: the weights are stored in several dtypes ({', '.join(dtypes)}): "
            "choose one by the argument dtype"
        )
    return DTYPES[dtypes[0]]
