"""How much of the score matrix the kernels compute for a mask, on the tiles of sm_90's tables.

`score_tile` is counted, as in tests/ops/attention/test_tiles_visited.py, which proves that no tile
is computed without need; here the tiles are the real ones. Runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastattn import BlockMask
from fastattn.ops.attention import triton as kernels
from fastattn.ops.attention.problem import check, check_varlen

Counts = dict[str, dict[str, Any]]

SEQLEN, HEAD_DIM = 384, 128


@contextlib.contextmanager
def _counted() -> Iterator[Counts]:
    """By kernel: the shape of a tile, how many are computed from now on, and scores in them."""
    counts: Counts = {}
    modules = {
        kernel: importlib.import_module(f"fastattn.ops.attention.triton.{name}")
        for kernel, name in (("forward", "fold"), ("keys", "keys"), ("queries", "queries"))
    }
    functions = {name: module.score_tile for name, module in modules.items()}

    def counting(kernel: str) -> Callable[..., Any]:
        def score_tile(products: Any, i: Any, j: Any, *args: Any) -> Any:
            queries, keys = i.handle.data, j.handle.data
            shape = f"{queries.size} x {keys.size}"
            count = counts.setdefault(kernel, {"tile": shape, "tiles": 0, "scores": 0})
            assert count["tile"] == shape
            count["tiles"] += 1
            count["scores"] += queries.size * keys.size
            return functions[kernel](products, i, j, *args)

        return score_tile

    for name, module in modules.items():
        module.score_tile = counting(name)
    try:
        yield counts
    finally:
        for name, module in modules.items():
            module.score_tile = functions[name]


def _of(q: torch.Tensor, k: torch.Tensor, call: tuple[Any, Any], backward: bool = True) -> Counts:
    settings, extras = call
    with _counted() as counts:
        out, lse = kernels.forward(q, k, k, extras, settings)
        if backward:
            kernels.backward(out, lse, out, lse, False, False, q, k, k, extras, settings)
    return counts


def _padded(**features: Any) -> Counts:
    q = torch.zeros(1, SEQLEN, 1, HEAD_DIM, dtype=torch.float16)
    return _of(q, q, check(q, q, q, **features))


def _packed() -> Counts:
    """Sequences of no round lengths behind each other."""
    starts = torch.tensor([0, 100, 300, SEQLEN], dtype=torch.int32)
    q = torch.zeros(SEQLEN, 1, HEAD_DIM, dtype=torch.float16)
    return _of(q, q, check_varlen(q, q, q, starts, starts, 200, 200, causal=True))


def _decoding() -> Counts:
    """One query of eight heads on one key head; the second sequence is short."""
    q = torch.zeros(2, 1, 8, HEAD_DIM, dtype=torch.float16)
    k = torch.zeros(2, 2 * SEQLEN, 1, HEAD_DIM, dtype=torch.float16)
    lengths = torch.tensor([700, 100])
    return _of(q, k, check(q, k, k, key_lengths=lengths), backward=False)


def _documents() -> torch.Tensor:
    lengths = torch.tensor([100, 28, 156, SEQLEN - 284])
    return torch.arange(4).repeat_interleave(lengths)[None]


def _blocks() -> BlockMask:
    """A band along the diagonal, and the first keys."""
    return BlockMask.from_predicate(
        lambda b, h, i, j: (j <= i) & ((i - j < 128) | (j < 64)), 1, 1, SEQLEN, SEQLEN
    )


MASKS: dict[str, Callable[[], Counts]] = {
    "no mask": _padded,
    "causal": lambda: _padded(causal=True),
    "causal, window": lambda: _padded(causal=True, window=(128, 0)),
    "causal, key_lengths": lambda: _padded(causal=True, key_lengths=torch.tensor([200])),
    "causal, documents": lambda: _padded(causal=True, document_ids=_documents()),
    "block mask": lambda: _padded(block_mask=_blocks()),
    "causal, packed": _packed,
    "decoding": _decoding,
}


def computed() -> dict[str, Counts]:
    """By mask and kernel."""
    return {name: count() for name, count in MASKS.items()}
