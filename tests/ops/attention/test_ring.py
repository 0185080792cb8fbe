"""Attention on parts of a sequence, one for each process: the rows of one process's results."""

from __future__ import annotations

import re
from typing import Any

import processes
import pytest
import torch
from ops.attention import tasks
from ops.attention.tasks import Ring

from fastattn.ops.attention import ring_attention

RINGS = {
    "full": Ring(causal=False),
    "causal": Ring(),
    "one token a piece": Ring(piece=1),
    "grouped heads, softcap, scale": Ring(
        piece=5, heads=6, softcap=2.0, softmax_scale=0.7, head_dim=5
    ),
    "narrow values": Ring(kv_heads=1, head_dim_v=3, softmax_scale=-0.4),
    "window": Ring(window=(4, 0), piece=9),
    "window on both sides": Ring(causal=False, window=(10, 3)),
    "window of one key": Ring(window=(0, 0)),
    "packed": Ring(batch=1, piece=9, lengths=(3, 1, 17, 0, 10, 5), kv_heads=1),
    "packed, window": Ring(batch=1, piece=9, lengths=(20, 4, 12), window=(5, -1)),
    "packed, not causal": Ring(batch=1, lengths=(9, 19), causal=False),
    "float64": Ring(dtype=torch.float64),
    "bfloat16": Ring(dtype=torch.bfloat16, head_dim=32, backend="torch"),
    "bfloat16, packed": Ring(dtype=torch.bfloat16, batch=1, lengths=(9, 19), backend="torch"),
    "only the LSE": Ring(only_lse=True),
}


@pytest.mark.parametrize("name", RINGS)
def test_on_two_processes(name: str) -> None:
    processes.run(2, tasks.held_to_the_rule, RINGS[name])


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_on_one_process(name: str) -> None:
    ring = RINGS[name]
    processes.run(1, tasks.held_to_the_rule, Ring(piece=18, batch=1, lengths=ring.lengths))


@pytest.mark.long
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", RINGS)
def test_on_more_processes(name: str, size: int) -> None:
    ring = RINGS[name]
    changes: dict[str, Any] = {"seed": size}
    if ring.lengths is not None:  # the last one is as long as is left
        *first, _ = ring.lengths
        changes["lengths"] = (*first, 2 * size * ring.piece - sum(first))
    processes.run(size, tasks.held_to_the_rule, Ring(**{**vars(ring), **changes}))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_packed_sequences_do_not_leak(size: int) -> None:
    lengths = (5, 1, 14, 4) if size == 2 else (5, 1, 14, 4, 24)
    results = processes.run(size, tasks.leaks, lengths)
    for of_sequence in zip(*results):
        assert any(own for own, _ in of_sequence)
        assert not any(others for _, others in of_sequence)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_sent(size: int, dtype: torch.dtype) -> None:
    """As docs/scaling.md has it: forward R - 1 times k and v; backward the same, and R times their
    gradients in float32."""
    for forward, backward, own in processes.run(size, tasks.bytes_sent, Ring(dtype=dtype)):
        assert forward == (size - 1) * own
        assert backward == (size - 1) * own + size * own * 4 // dtype.itemsize


# What changes in a call that is right, the shapes of its tensors, and the error.
ERRORS: list[tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = [
    ({}, {"all": (1, 5, 2, 8)}, "ValueError: q, k and v must .* one even length; got 5 .* 5"),
    ({}, {"q": (1, 2, 2, 8)}, "ValueError: q, k and v must .* got 2 queries and 4 keys"),
    ({}, {"all": (1, 0, 2, 8)}, "ValueError: q, k and v must .* got 0 queries"),
    ({}, {"k": (1, 4, 2, 6)}, "ValueError: k must have q's head_dim 8"),
    ({"group": None}, {}, "TypeError: group must be a torch.distributed.ProcessGroup"),
    ({"causal": "top_left"}, {}, "ValueError: causal must be True or False"),
    ({"window": (1,)}, {}, "ValueError: window must be"),
    ({"dropout_p": 0.1}, {}, "TypeError: .* unexpected keyword argument 'dropout_p'"),
    ({"cu_seqlens": torch.tensor([0, 3])}, {}, "ValueError: cu_seqlens must go from 0 to the 4"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, {}, "not decreasing"),
    ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, {}, "ValueError: cu_seqlens must go"),
    ({"cu_seqlens": torch.tensor([0.0, 4.0])}, {}, "TypeError: cu_seqlens must be int32"),
    ({"cu_seqlens": torch.tensor([0, 4])}, {"all": (2, 4, 2, 8)}, "batch must be 1; got 2"),
]  # fmt: skip


def test_errors() -> None:
    said = processes.run(1, tasks.refusals, [(changes, shapes) for changes, shapes, _ in ERRORS])[0]
    for words, (_, _, message) in zip(said, ERRORS):
        assert re.search(message, words), words


def test_without_processes() -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="init_process_group"):
        ring_attention(x, x, x, None)  # type: ignore[arg-type]
