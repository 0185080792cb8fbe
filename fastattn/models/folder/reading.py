"""Reading a Hugging Face GPT-2 folder.

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
from fastattn.models.config import GPTConfig
from fastattn.models.folder.layout import (
    CONFIG,
    FIELDS,
    GENERATION,
    HEAD,
    INDEX,
    PREFIX,
    WEIGHTS,
    Stored,
    layout,
)

# All that is downloaded: pickle files may hold code, and are not even fetched.
DOWNLOADED = [CONFIG, GENERATION, WEIGHTS, INDEX, "model-*-of-*.safetensors"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# Causal masks that older versions of transformers saved as buffers.
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# Defaults of GPT2Config where a file is silent, which GPTConfig does not share.
SILENT = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read(
    path: str | PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the weights, by the names of `GPT`'s parameters, in a folder or on the Hub.

    Args:
        path: a folder with config.json and safetensors, or the name of a repository on the Hugging
            Face Hub ("gpt2", "user/name"), of which only those files are downloaded, once.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights; None keeps the one that they are stored in.
        device: of the weights; None is torch's default.

    Raises:
        FileNotFoundError: no such folder or repository, or no config or weights in it.
        ValueError: what is there is not a GPT-2: a config of another model, weights missing,
            unexpected or of another shape (all are listed), a damaged file (named), pickled weights
            (with the way to convert them).
        ImportError: safetensors, or for a download huggingface_hub, is not installed.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}"
        )
    where = _folder(path, revision)
    config = read_config(where / CONFIG)
    files = _weight_files(where)
    with contextlib.ExitStack() as stack:
        sources = _sources(where, files, stack)
        _check_layers(where, config, sources)
        stored = layout(config)
        _check_tensors(where, config, stored, sources)
        if dtype is None:
            dtype = _one_dtype(where, [sources[s.name] for s in stored.values()])
        weights = {}
        for name, how in stored.items():
            tensor = sources[how.name].tensor()
            tensor = tensor.t() if how.transposed else tensor
            # A copy in any case: the file may be mapped into memory, and may be replaced.
            weights[name] = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        if config.tie_word_embeddings:
            if HEAD in sources and not torch.equal(
                sources[HEAD].tensor(), sources["wte.weight"].tensor()
            ):
                raise ValueError(
                    f"{where}: lm_head.weight differs from wte.weight, although config.json ties "
                    'them; to keep both set "tie_word_embeddings": false there'
                )
            weights[HEAD] = weights["wte.weight"]
    return config, weights


def read_config(path: Path) -> GPTConfig:
    """The `GPTConfig` in a config.json of GPT-2; ValueError, naming the file, for any other.

    The special tokens are those of a generation_config.json beside it, if there is one, even where
    it does not name them: by them transformers generates.
    """
    data = _read_json(path)
    model_type = data.get("model_type")
    if model_type != "gpt2":
        raise ValueError(f'{path}: "model_type" must be "gpt2", got {model_type!r}')
    if data.get("add_cross_attention"):
        raise ValueError(f'{path}: "add_cross_attention" is on, which GPT does not have')
    try:
        config = GPTConfig(**{**SILENT, **{k: v for k, v in data.items() if k in FIELDS}})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    beside = path.with_name(GENERATION)
    if not beside.exists():
        return config
    data = _read_json(beside)
    tokens: dict[str, Any] = {name: data.get(name) for name in SPECIAL_TOKENS}
    try:
        return dataclasses.replace(config, **tokens)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{beside}: {error}") from error


def _folder(path: str | PathLike[str], revision: str | None) -> Path:
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


def _read_json(path: Path) -> dict[str, Any]:
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
                f"transformers.GPT2LMHeadModel.from_pretrained({str(folder)!r})"
                ".save_pretrained(new_folder)"
            )
        raise FileNotFoundError(
            errno.ENOENT, f"the folder has neither {WEIGHTS} nor {INDEX}", str(folder)
        )
    index = folder / INDEX
    weight_map = _read_json(index).get("weight_map")
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
    folder: Path, files: dict[str, set[str] | None], stack: contextlib.ExitStack
) -> dict[str, _Source]:
    """All tensors of the files, by GPT-2's names without "transformer."; masks are left out."""
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
            short = name.removeprefix(PREFIX)
            if MASKS.fullmatch(short):
                continue
            if short in sources:
                raise ValueError(f"{path}: {short!r} is there twice, with and without {PREFIX!r}")
            sources[short] = _Source(
                path,
                tuple(slices[name].get_shape()),
                slices[name].get_dtype(),
                functools.partial(opened.get_tensor, name),
            )
    return sources


def _check_layers(folder: Path, config: GPTConfig, sources: dict[str, _Source]) -> None:
    """Raise unless config and weights agree on the layers, before so many are laid out."""
    layers = {match[1] for name in sources if (match := re.match(r"h\.(\d+)\.", name))}
    if config.n_layer != len(layers):
        raise ValueError(
            f'{folder}: "n_layer" of config.json is {config.n_layer}, but the weights have '
            f"{len(layers)} layers"
        )


def _check_tensors(
    folder: Path,
    config: GPTConfig,
    stored: dict[str, Stored],
    sources: dict[str, _Source],
) -> None:
    """Raise one error that lists every tensor that is missing, unexpected or of another shape."""
    expected = {how.name: how.shape for how in stored.values()}
    if config.tie_word_embeddings and HEAD in sources:
        expected[HEAD] = (config.vocab_size, config.n_embd)
    wrong = [f"{name} is missing" for name in expected if name not in sources]
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
            f"{folder}: the weights are not those of the GPT-2 that config.json describes:\n  "
            + "\n  ".join(wrong)
        )


def _one_dtype(folder: Path, sources: list[_Source]) -> torch.dtype:
    dtypes = sorted({source.dtype for source in sources})
    if len(dtypes) > 1:
        raise ValueError(
            f"{folder}: the weights are stored in several dtypes ({', '.join(dtypes)}): "
            "choose one by the argument dtype"
        )
    return DTYPES[dtypes[0]]
