"""The cache by itself; that models read it right is tested with generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn
from fastattn import GPTConfig
from fastattn.models import KVCache


@pytest.fixture
def config(small: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**{**small, "n_layer": 1})


def _new(batch: int, seqlen: int, first: float) -> torch.Tensor:
    """(batch, seqlen, heads, head_dim), token t of sequence b being first + 100 b + t."""
    values = first + 100 * torch.arange(batch)[:, None] + torch.arange(seqlen)
    return values[:, :, None, None].expand(batch, seqlen, 4, 12).float()


def _append(cache: KVCache, new: torch.Tensor) -> list:
    """As a layer does; the positions."""
    positions = cache.begin(new.shape[1])
    keys, values, lengths = cache.layers[0][:3]
    with torch.no_grad():
        fastattn.attention_with_kv_cache(new, keys, values, lengths, k=new, v=-new)
    before = positions.tolist()
    cache.end(new.shape[1])
    return before


def _held(cache: KVCache) -> list[list[float]]:
    """The first number of each key that each sequence holds; the values are their negatives."""
    keys, values, lengths = cache.layers[0][:3]
    held = [k[:n, 0, 0].tolist() for k, n in zip(keys, lengths.tolist())]
    assert held == [(-v[:n, 0, 0]).tolist() for v, n in zip(values, lengths.tolist())]
    return held


def test_growth(config: GPTConfig) -> None:
    cache = KVCache(config, 2, 8)
    assert _append(cache, _new(2, 3, 0)) == [[0, 1, 2]] * 2
    assert _append(cache, _new(2, 2, 3)) == [[3, 4]] * 2
    assert _held(cache) == [[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]]


def test_each_sequence_grows_at_its_own_end(config: GPTConfig) -> None:
    cache = KVCache(config, 2, 8)
    _append(cache, _new(2, 3, 0))
    cache.set_lengths([3, 1])
    assert _append(cache, _new(2, 1, 50)) == [[3], [1]]
    assert _held(cache) == [[0, 1, 2, 50], [100, 150]]
    assert _append(cache, _new(2, 2, 60)) == [[4, 5], [2, 3]]
    assert _held(cache) == [[0, 1, 2, 50, 60, 61], [100, 150, 160, 161]]


def test_steps_use_the_same_memory(config: GPTConfig) -> None:
    cache = KVCache(config, 2, 8)
    before = [x.data_ptr() for x in (*cache.layers[0][:3], cache.lengths)]
    for _ in range(2):
        _append(cache, _new(2, 1, 0))
    assert [x.data_ptr() for x in (*cache.layers[0][:3], cache.lengths)] == before
    assert cache.lengths.tolist() == [2, 2] and cache.longest == 2


def test_reset(config: GPTConfig) -> None:
    cache = KVCache(config, 1, 4)
    _append(cache, _new(1, 4, 0))
    cache.set_lengths([2])
    cache.reset()
    assert _append(cache, _new(1, 2, 7)) == [[0, 1]] and _held(cache) == [[7, 8]]


def test_reorder(config: GPTConfig) -> None:
    cache = KVCache(config, 3, 8)
    _append(cache, _new(3, 4, 0))
    cache.set_lengths([4, 2, 3])
    cache.reorder(torch.tensor([2, 1, 0]))
    assert _held(cache) == [[200, 201, 202], [100, 101], [0, 1, 2, 3]]
    _append(cache, _new(3, 1, 50))
    assert _held(cache) == [[200, 201, 202, 50], [100, 101, 150], [0, 1, 2, 3, 250]]


def test_reorder_copies_only_some_slots(config: GPTConfig) -> None:
    cache = KVCache(config, 2, 8)
    _append(cache, _new(2, 5, 0))
    cache.reorder(torch.tensor([1, 1]), 2, 4)
    assert _held(cache) == [[0, 1, 102, 103, 4], [100, 101, 102, 103, 104]]


def test_fill(config: GPTConfig) -> None:
    cache, source = KVCache(config, 3, 8), KVCache(config, 2, 4)
    _append(source, _new(2, 3, 0))
    source.set_lengths([3, 2])
    cache.fill(source, torch.tensor([1, 0, 0]))
    assert _held(cache) == [[100, 101], [0, 1, 2], [0, 1, 2]] and cache.longest == 3
    assert _append(cache, _new(3, 1, 50)) == [[2], [3], [3]]
    assert _held(source) == [[0, 1, 2], [100, 101]]


def test_place(config: GPTConfig) -> None:
    cache, source = KVCache(config, 3, 8), KVCache(config, 2, 4)
    _append(source, _new(2, 3, 0))
    source.set_lengths([3, 1])
    cache.place(source, torch.tensor([2, 0]))
    assert (_held(cache), cache.longest) == ([[100], [], [0, 1, 2]], 3)
    _append(cache, _new(3, 1, 50))
    assert _held(cache) == [[100, 50], [150], [0, 1, 2, 250]]


def test_errors(config: GPTConfig) -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        KVCache(config, 1, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        KVCache(config, 0, 4)
    cache = KVCache(config, 2, 4)
    with pytest.raises(ValueError, match="room for 4 tokens and holds 0: 5 more do not fit"):
        cache.begin(5)
    _append(cache, _new(2, 4, 0))
    for lengths in ([1], [1, 5], [-1, 1]):
        with pytest.raises(ValueError, match="lengths must"):
            cache.set_lengths(lengths)
    cache.set_lengths([4, 2])
    with pytest.raises(ValueError, match="room for 4 tokens and holds 4: 1 more do not fit"):
        cache.begin(1)
