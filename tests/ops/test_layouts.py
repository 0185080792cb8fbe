"""A tensor that no op takes is refused, also after a call that differs from it in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fastattn

X, W, V = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(8)
W1, B1 = torch.randn(16, 8), torch.randn(16)
W2 = torch.randn(8, 16)
Q, CACHE = torch.randn(2, 1, 2, 8), torch.randn(2, 9, 2, 8)
PACKED, ANGLES = torch.randn(7, 2, 8), torch.randn(5, 4)
TARGETS, LENGTHS = torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 4], dtype=torch.int32)
STARTS = torch.tensor([0, 3, 7], dtype=torch.int32)

# The call, and the tensors of which one is not dense.
CALLS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "attention": (fastattn.attention, (Q, CACHE, CACHE)),
    "attention_varlen": (
        lambda q, k, v: fastattn.attention_varlen(q, k, v, STARTS, STARTS, 7, 7),
        (PACKED,) * 3,
    ),
    "attention_with_kv_cache": (
        lambda q, k, v: fastattn.attention_with_kv_cache(q, k, v, LENGTHS),
        (Q, CACHE, CACHE),
    ),
    "merge_attention_states": (
        lambda out, lse: fastattn.merge_attention_states([Q, out], [lse, lse]),
        (Q, torch.zeros(2, 2, 1)),
    ),
    "layer_norm": (fastattn.layer_norm, (X, V, V)),
    "rms_norm": (fastattn.rms_norm, (X, V)),
    "linear": (fastattn.linear, (X, W)),
    "ffn": (lambda *x: fastattn.ffn(*x, None), (X, W1, B1, W2)),
    "rotary": (fastattn.rotary, (Q.expand(-1, 5, -1, -1), CACHE[:, :5], ANGLES, ANGLES)),
    "cross_entropy": (lambda x: fastattn.cross_entropy(x, TARGETS), (X,)),
    "linear_cross_entropy": (lambda x, w: fastattn.linear_cross_entropy(x, w, TARGETS), (X, W)),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", CALLS)
def test_a_sparse_tensor_after_a_dense_one(op: str, backend: str | None) -> None:
    call, tensors = CALLS[op]
    with fastattn.use_backend(backend) if backend else nullcontext():
        call(*tensors)
        for n, tensor in enumerate(tensors):
            given = list(tensors)
            given[n] = tensor.to_sparse()
            with pytest.raises(TypeError, match="must be a dense tensor; got the layout"):
                call(*given)
