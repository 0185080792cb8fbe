"""Reading a Hugging Face folder of any family that is known.

Nothing is made before all is checked, from the names and shapes in the files' headers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.files import local_path
from fastattn.models.families import Family, family_of
from fastattn.models.folder.layout import (
    CONFIG,
    GENERATION,
    INDEX,
    WEIGHTS,
    Stored,
    layout,
    shared_names,
    stored_name,
)

# All that is downloaded: pickle files may hold code, and are not even fetched.
DOWNLOADED = [CONFIG, GENERATION, WEIGHTS, INDEX, "model-*-of-*.safetensors"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# Frequencies of rotary embeddings, which older versions of transformers saved as buffers.
FREQUENCIES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read(
    cls: Any,
    path: str | PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Family, Any, dict[str, Tensor]]:
    """The family, the config and the ``state_dict`` of a model of class ``cls``.

    Arguments and errors are those of `Pretrained.from_pretrained`.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}"
        )
    folder = local_folder(path, revision)
    family, config = read_config(folder / CONFIG)
    if not issubclass(cls.config_class, family.config_class):
        raise ValueError(
            f"{folder}: {family.title} is no {cls.__name__}: fastattn.models.load reads it"
        )
    files = _weight_files(folder)
    with contextlib.ExitStack() as stack:
        sources = _sources(folder, family, files, stack)
        config = _with_head(family, config, sources)
        family = family.of(config)
        _check_layers(folder, family, config, sources)
        weights = _weights(folder, family, cls(config, device="meta"), sources, dtype, device)
    return family, config, weights


def read_config(path: Path) -> tuple[Family, Any]:
    """The family and our config of a config.json; ValueError, naming the file, for any other.

    The special tokens are those of a generation_config.json beside it, if there is one, even where
    it does not name them: by them transformers generates.
    """
    data = read_json(path)
    try:
        family = family_of(data.get("model_type"))
        config = family.read_config(data)
    except (TypeError, ValueError) as error:
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
    sources: dict[str, _Source],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """The ``state_dict`` of ``model``, read; a tensor of several names is one."""
    entries = layout(model, family)
    same = _same_tensors(model, family, entries)
    _check_tensors(folder, family, entries, same, sources)
    names = [family.short(name) for entry in entries for name in entry.names]
    needed = [sources[name] for name in names if name in sources]
    dtype = _one_dtype(folder, needed) if dtype is None else dtype
    weights: dict[str, Tensor] = {}
    for entry in entries:
        weights |= _read(entry, family, sources, dtype, device)
    for other, first in same.items():
        if other in sources and not torch.equal(sources[other].tensor(), sources[first].tensor()):
            raise ValueError(
                f"{folder}: {other} differs from {first}, although config.json ties them; to keep "
                'both set "tie_word_embeddings": false there'
            )
    for other, first in shared_names(model):
        weights[other] = weights[first]
    return weights


def _read(
    entry: Stored,
    family: Family,
    sources: dict[str, _Source],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Our tensors of an entry, each a copy: a file may be mapped into memory, and be replaced."""
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


def local_folder(path: str | PathLike[str], revision: str | None) -> Path:
    """The local folder of ``path``, downloaded if it is the name of a repository."""
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
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED)
        )
    except Exception as error:  # of many kinds, the HTTP client's own among them
        raise FileNotFoundError(
            errno.ENOENT,
            "no such folder here, and the Hugging Face Hub did not give a repository of this name "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            name,
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "the folder lacks this file", str(path)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a JSON object, got a {type(data).__name__}")
    return data


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """File names -> the tensors that the index promises in each, None where there is no index."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder}: the weights are pickled ({', '.join(pickles)}), which can run any code "
                "when read, and are refused. Convert them where you trust them: "
                f"transformers.AutoModel.from_pretrained({str(folder)!r})"
                ".save_pretrained(new_folder)"
            )
        raise FileNotFoundError(
            errno.ENOENT, f"the folder has neither {WEIGHTS} nor {INDEX}", str(folder)
        )
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index}: "weight_map" must say for each tensor in which file it is')
    files: dict[str, set[str] | None] = {}
    for tensor, file in weight_map.items():
        # A plain name: no folder, no parent, no drive.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise ValueError(
                f"{index}: {tensor!r} must be in a .safetensors file beside the index, got {file!r}"
            )
        promised = files.setdefault(file, set())
        assert promised is not None
        promised.add(tensor)
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: missing, although {INDEX} names it")
    return files


@dataclasses.dataclass(frozen=True)
class _Source:
    """A tensor in an open file, not yet read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    tensor: Callable[[], Tensor]


def _sources(
    folder: Path,
    family: Family,
    files: dict[str, set[str] | None],
    stack: contextlib.ExitStack,
) -> dict[str, _Source]:
    """All tensors of the files by their names without the family's prefix; no masks."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            'reading weights takes safetensors: pip install "fastattn[hf]"'
        ) from error
    sources: dict[str, _Source] = {}
    for file, promised in files.items():
        path = folder / file
        try:
            # Checks the header: its length, JSON, dtypes, and that the tensors tile the file.
            opened = stack.enter_context(safe_open(path, framework="pt"))
            names = set(opened.keys())
            slices = {name: opened.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error
        if promised is not None and promised - names:
            raise ValueError(
                f"{path}: lacks tensors that {INDEX} says it has: "
                f"{', '.join(sorted(promised - names))}"
            )
        for name in names if promised is None else promised:
            short = family.short(name)
            if FREQUENCIES.fullmatch(short) or (
                family.ignored is not None and family.ignored.fullmatch(short)
            ):
                continue
            if short in sources:
                raise ValueError(
                    f"{path}: {short!r} is there twice, with and without {family.prefix!r}"
                )
            sources[short] = _Source(
                path,
                tuple(slices[name].get_shape()),
                slices[name].get_dtype(),
                functools.partial(opened.get_tensor, name),
            )
    return sources


def _with_head(family: Family, config: Any, sources: dict[str, _Source]) -> Any:
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


def _check_layers(folder: Path, family: Family, config: Any, sources: dict[str, _Source]) -> None:
    """Raise unless config and weights agree on the layers, before so many are laid out."""
    for beginning, key in family.depths.items():
        pattern = re.compile(re.escape(beginning) + r"(\d+)\.")
        layers = {match[1] for name in sources if (match := pattern.match(name))}
        field = family.fields[key]
        count = getattr(config, field if isinstance(field, str) else field[0])
        if count != len(layers):
            raise ValueError(
                f'{folder}: "{key}" of config.json is {count}, but the weights have {len(layers)} '
                "layers"
            )


def _check_tensors(
    folder: Path,
    family: Family,
    entries: list[Stored],
    same: dict[str, str],
    sources: dict[str, _Source],
) -> None:
    """Raise one error that lists every tensor that is missing, unexpected or of another shape."""
    expected = {
        family.short(name): shape
        for entry in entries
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    expected |= {other: expected[first] for other, first in same.items() if other in sources}
    needed = expected.keys() - family.zeros
    wrong = [f"{name} is missing" for name in expected if name in needed and name not in sources]
    wrong += [f"{name} is unexpected" for name in sorted(sources) if name not in expected]
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


def _one_dtype(folder: Path, sources: list[_Source]) -> torch.dtype:
    dtypes = sorted({source.dtype for source in sources})
    if len(dtypes) > 1:
        raise ValueError(
            f"{folder}: the weights are stored in several dtypes ({', '.join(dtypes)}): "
            "choose one by the argument dtype"
        )
    return DTYPES[dtypes[0]]
