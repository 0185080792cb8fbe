"""A peer: somebody's way to do the work of a cell. Each subject's script has its own peers.

One small function makes one peer: it takes the cell (shapes, dtype, device, options) and returns a
`Peer`, or raises `Refused` with the reason why it cannot do the cell. All peers of an op take the
same tensors in the same layout and return the same result, transposes included in their time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import checkout  # noqa: F401
import torch
from torch import Tensor

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}

Outputs = Tensor | tuple[Tensor, ...]


class Refused(Exception):
    """A peer is absent or cannot do this cell; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A way to do the cell's work.

    `context` is entered around a batch of calls. A `ceiling` moves bytes or multiplies matrices as
    the op must, without doing its work: it is called as it stands, and its result is not compared.
    `bytes` and `flops` are a call's, where they are not what the cell says.
    """

    function: Callable[..., Outputs]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    ceiling: bool = False
    bytes: float | None = None
    flops: float | None = None


def compiled(peer: Peer) -> Peer:
    """torch.compile of a peer, for static shapes."""
    torch._dynamo.reset()  # all cells share one code object, and it may be recompiled 8 times only
    torch._functorch.config.donated_buffer = False  # the backward is timed with retain_graph
    return replace(peer, function=torch.compile(peer.function, dynamic=False, fullgraph=True))


def with_compiled(
    peers: Mapping[str, Callable[..., Peer]], compile: bool
) -> Mapping[str, Callable[..., Peer]]:
    """The peers; `compile`: and the eager one by torch.compile."""
    if not compile:
        return peers
    return {**peers, "compiled": lambda cell: compiled(peers["eager"](cell))}


def imported(module: str, package: str, gpu: Any = None) -> ModuleType:
    """The module of an optional package. Raises Refused where it cannot be imported, or `gpu` is a
    cell that is on none.
    """
    try:
        found = importlib.import_module(module)
    except Exception as failure:  # a package built for another torch fails in its own ways
        if isinstance(failure, ModuleNotFoundError) and failure.name == module.split(".")[0]:
            raise Refused(f"{package} is not installed") from None
        raise Refused(f"{package} cannot be imported: {failure}") from failure
    if gpu is not None:
        on_a_gpu(gpu, package)
    return found


def on_a_gpu(cell: Any, package: str) -> None:
    if cell.device != "cuda":
        raise Refused(f"{package} runs on CUDA devices")


def first(result: Any) -> Tensor:
    """The output, of functions that return the LSE too or not, by version."""
    return result if isinstance(result, Tensor) else result[0]


def matmul(cell: Any) -> Peer:
    """A large square product in the cell's dtype: the most that the device can multiply."""
    size = MATMUL_SIZE[cell.device]
    a, b = cell.randn(size, size), cell.randn(size, size)
    return Peer(lambda *_: a @ b, ceiling=True, flops=2.0 * size**3)
