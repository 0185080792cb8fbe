"""The tensors of a checkpoint in safetensors files, of which each process writes a part.

With several processes torch.distributed.checkpoint plans and writes, in safetensors files whose
headers say where a part lies in the whole. So a checkpoint of any number of processes is read by
any other, and nothing in it is a pickle (DCP's usual `.metadata` is one).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.training.distributed.processes import Processes, losses_named
from fastattn.training.optional import require
from fastattn.training.steps.gradients import local

WHOLE = "tensors.safetensors"  # of one process


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the memory of the CPU, which training does not change."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def local_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of this process's parts."""
    return sum(local(tensor).nbytes for tensor in tensors.values())


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device and strides to one file."""
    safetensors = require("safetensors.torch", "train", "a checkpoint")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.save_file(plain, path)


def write(tensors: Mapping[str, Tensor], folder: Path, processes: Processes) -> None:
    """Write tensors to `folder`, of DTensors each process its part; all must call it.

    Raises:
        OSError, SafetensorError: a file could not be written, on any process.
        LostProcessError: another process ended.
    """
    if processes.count == 1:
        save(tensors, folder / WHOLE)
        return
    checkpoint = _engine()
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _errors(), losses_named():
        checkpoint.save(plain, storage_writer=writer, process_group=processes.control)


def described(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The sizes and dtypes of the tensors in `folder`, by the headers of its files.

    Raises:
        SafetensorError: a file is none of safetensors, or its header does not fit it.
    """
    safe_open = require("safetensors", "train", "a checkpoint").safe_open
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt"):
            pass
    metadata = _engine().HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }


def read(folder: Path, into: dict[str, Tensor], processes: Processes) -> None:
    """Fill tensors, of DTensors the local parts, whatever the parts in the files are."""
    checkpoint = _engine()
    with _errors(), losses_named(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        checkpoint.load(
            into,
            storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)),
            process_group=processes.control,
            no_dist=processes.count == 1,
        )


def _engine() -> Any:
    """torch.distributed.checkpoint, which takes half a second to import."""
    require("safetensors", "train", "a checkpoint")
    return require("torch.distributed.checkpoint", "train", "a checkpoint")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Raise what one of the processes raised, in place of a report of all of them."""
    try:
        yield
    except _engine().CheckpointException as report:
        raise next(iter(report.failures.values()))[0] from report
