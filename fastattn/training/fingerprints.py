"""Fingerprints that tell runs and batches apart: JSON and hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.training.contract import Batch

# Of a transformers config: the version that wrote it, and where it was read.
NO_PART_OF_A_MODEL = ("transformers_version", "_name_or_path")


def batches_digest(batches: Iterable[Batch]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of all arguments: names, dtypes, shapes, bytes."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.arguments.items()):
            for part in _parts(value):
                if isinstance(part, Tensor):
                    digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                    flat = part.detach().cpu().contiguous().flatten()
                    digest.update(flat.view(torch.uint8).numpy().data)
                elif isinstance(part, (int, float, str)):  # a process group has no name to last
                    digest.update(f"{name} {part!r}".encode())
    return digest.hexdigest()[:12]


def model_fingerprint(model: torch.nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's class, its config where it has one, and the tensors that training changes."""
    config: Any = getattr(model, "config", None)
    settings = {}
    if hasattr(config, "to_dict"):
        settings = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        settings = dataclasses.asdict(config)
    return {
        "class": type(model).__name__,
        "config": {k: v for k, v in settings.items() if k not in NO_PART_OF_A_MODEL},
        "trained": {name: f"{t.dtype} {list(t.shape)}" for name, t in trained.items()},
    }


def as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint as it is when it has been written as JSON and read."""
    plain: dict[str, Any] = json.loads(json.dumps(fingerprint, default=str))
    return plain


def difference(saved: Any, now: Any, key: str = "") -> str | None:
    """The first key in which two fingerprints differ, with both values; None if they are equal."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in {**saved, **now}:
            inner = f"{key}.{name}" if key else name
            if name not in saved or name not in now:
                return f"{inner} is only {'there' if name in saved else 'here'}"
            if (found := difference(saved[name], now[name], inner)) is not None:
                return found
        return None
    return None if saved == now else f"{key} is {saved!r} there and {now!r} here"


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value
