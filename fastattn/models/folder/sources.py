"""The tensors in the safetensors files of a folder, known by their headers and not yet read.

A file is mapped into memory, privately: a weight that is used as it is stored is read from the disk
when it is first used and never copied, and a write to it changes no file. The file may be replaced
(by a rename, as `save_pretrained` does it) but must not be written over in place while a model that
was read from it lives; it is as with transformers.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.files import parsed_json
from fastattn.files import read_json as read_value
from fastattn.models.families import Family
from fastattn.models.folder.layout import INDEX, WEIGHTS

# Pickle files may hold code.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# How other files begin. A safetensors file begins with eight bytes of a length, then "{".
OTHERS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
    b"\x1f\x8b": "a gzip file",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"version ": "a pointer of Git LFS (git lfs pull fetches the file)",
}

# Frequencies of rotary embeddings, which older versions of transformers saved as buffers.
FREQUENCIES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
BYTES = "U8"  # tables of weights of 8 bits (rounded.py)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor in a file, not yet read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    tensor: Callable[[], Tensor]  # on the CPU; writable, and nobody else writes to it


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_value(path)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "the folder lacks this file", str(path)) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a JSON object, got a {type(data).__name__}")
    return data


def weight_files(folder: Path) -> dict[str, set[str] | None]:
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


def safetensors_sources(
    folder: Path,
    family: Family,
    files: dict[str, set[str] | None],
) -> dict[str, Source]:
    """All tensors of the files by their names without the family's prefix; no masks."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            'reading weights takes safetensors: pip install "fastattn[hf]"'
        ) from error
    sources: dict[str, Source] = {}
    for file, promised in files.items():
        path = folder / file
        if (kind := _other_kind(path)) is not None:
            raise ValueError(
                f"{path}: damaged, or not a safetensors file: it begins as {kind}. Pickled weights "
                "can run any code when read, and are refused whatever their name is"
            )
        try:
            # Checks the header: its length, JSON, dtypes, and that the tensors tile the file.
            with safe_open(path, framework="pt"):
                pass
            with path.open("rb") as opened:
                memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error
        header, begin = _header(path, memory)
        if promised is not None and (lacking := promised - header.keys()):
            raise ValueError(
                f"{path}: lacks tensors that {INDEX} says it has: {', '.join(sorted(lacking))}"
            )
        for name in header if promised is None else promised:
            short = family.short(name)
            if FREQUENCIES.fullmatch(short) or (
                family.ignored is not None and family.ignored.fullmatch(short)
            ):
                continue
            if short in sources:
                raise ValueError(
                    f"{path}: {short!r} is there twice, with and without {family.prefix!r}"
                )
            entry = header[name]
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            read = functools.partial(
                _mapped, path, memory, begin + entry["data_offsets"][0], dtype, shape
            )
            sources[short] = Source(path, shape, dtype, read)
    return sources


def _other_kind(path: Path) -> str | None:
    """What a file is by its first bytes, where they are known and no safetensors file's."""
    with path.open("rb") as opened:
        begin = opened.read(9)
    if begin[8:] == b"{":
        return None
    return next((kind for magic, kind in OTHERS.items() if begin.startswith(magic)), None)


def _header(path: Path, memory: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The entries of a file that safetensors has checked, and where its data begins."""
    (size,) = struct.unpack("<Q", memory[:8])
    try:
        header: dict[str, Any] = parsed_json(memory[8 : 8 + size])
    except ValueError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return header, 8 + size


def _mapped(
    path: Path, memory: mmap.mmap, begin: int, dtype: str, shape: tuple[int, ...]
) -> Tensor:
    """A tensor in a mapped file, which stays mapped as long as the tensor lives."""
    count, kind = math.prod(shape), torch.uint8 if dtype == BYTES else DTYPES[dtype]
    if not count:
        return torch.empty(shape, dtype=kind)
    if begin + count * kind.itemsize > len(memory):
        raise ValueError(f"{path}: ends before its tensors do; it has changed while it was read")
    return torch.frombuffer(memory, dtype=kind, count=count, offset=begin).view(shape)
