"""The cache by itself; that models read it right is tested with generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import GPTConfig
from fastattn.models import KVCache


@pytest.fixture
def config(small: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**{**small, "n_layer": 1})


def _new(batch: int, seqlen: int, first: float) -> torch.Tensor:
    """(batch, seqlen, heads, head_dim), token t of sequence b being first + 100 b + t."""
    values = first + 100 * torch.arange(batch)[:, None] + torch.arange(seqlen)
    return values[:, :, None, None].expand(batch, seqlen, 4, 12).float()


def _append(cache: KVCache, new: torch.Tensor) -> tuple[list, Any, torch.Tensor]:
    positions = cache.begin(new.shape[1]).tolist()
    keys, values, lengths = cache.layers[0].update(new, -new)
    for b in range(cache.batch_size):  # what is seen; the rest may hold anything
        seen = slice(None if lengths is None else int(lengths[b]))
        assert torch.equal(values[b, seen], -keys[b, seen])
    cache.end(new.shape[1])
    return positions, lengths, keys[..., 0, 0]


def test_uniform_growth(config: GPTConfig) -> None:
    cache = KVCache(config, 2, 8)
    positions, lengths, keys = _append(cache, _new(2, 3, 0))
    assert positions == [0, 1, 2] and lengths is None
    positions, lengths, keys = _append(cache, _new(2, 2, 3))
    assert positions == [3, 4] and lengths is None
    assert keys.tolist() == [[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]]


@pytest.mark.parametrize("static", [False, True])
def test_each_sequence_grows_at_its_own_end(config: GPTConfig, static: bool) -> None:
    cache = KVCache(config, 2, 8, static=static)
    _append(cache, _new(2, 3, 0))
    cache.set_lengths([3, 1])
    positions, lengths, keys = _append(cache, _new(2, 1, 50))
    assert positions == [[3], [1]] and lengths.tolist() == [4, 2]
    assert keys.shape == (2, 8 if static else 4)
    assert keys[0, :4].tolist() == [0, 1, 2, 50] and keys[1, :2].tolist() == [100, 150]
    positions, lengths, keys = _append(cache, _new(2, 1, 60))
    assert positions == [[4], [2]] and lengths.tolist() == [5, 3]
    assert keys[0, :5].tolist() == [0, 1, 2, 50, 60] and keys[1, :3].tolist() == [100, 150, 160]


def test_static_steps_use_the_same_memory(config: GPTConfig) -> None:
    cache = KVCache(config, 2, 8, static=True)
    cache.set_lengths([0, 0])
    before = cache.lengths.data_ptr()
    for _ in range(2):
        cache.begin(1)
        keys, _, _ = cache.layers[0].update(_new(2, 1, 0), _new(2, 1, 0))
        cache.end(1)
        assert keys.data_ptr() == cache.layers[0].keys.data_ptr() and keys.shape[1] == 8
    assert cache.lengths.data_ptr() == before and cache.lengths.tolist() == [2, 2]


def test_reset(config: GPTConfig) -> None:
    cache = KVCache(config, 1, 4)
    _append(cache, _new(1, 4, 0))
    cache.set_lengths([2])
    cache.reset()
    positions, lengths, keys = _append(cache, _new(1, 2, 7))
    assert positions == [0, 1] and lengths is None and keys.tolist() == [[7, 8]]


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
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        cache.begin(2)
    with pytest.raises(ValueError, match="room for 4 tokens and is full"):
        cache.begin(1)
