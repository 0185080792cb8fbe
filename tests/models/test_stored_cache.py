"""A model's cache of 8-bit numbers: its scales, and the logits that it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import GPT, GPTConfig
from fastattn.models import KVCache
from fastattn.nn.stored_cache import LARGEST, MARGIN

KINDS = pytest.mark.parametrize("kind", LARGEST, ids=("int8", "float8"))
PROMPT = 7


@pytest.fixture
def model(small: dict[str, Any], device: str) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**small)).to(device).eval()


@pytest.fixture
def ids(model: GPT) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (3, 13), device=model.device)


def read(model: GPT, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The logits of every position: a prompt at once, then token by token."""
    with torch.no_grad():
        parts = [model(ids[:, :PROMPT], cache=cache)]
        parts += [model(ids[:, t : t + 1], cache=cache) for t in range(PROMPT, ids.shape[1])]
    return torch.cat(parts, 1)


@KINDS
def test_the_prompt_fixes_the_scales(kind: torch.dtype, model: GPT, ids: torch.Tensor) -> None:
    plain, stored = model.new_cache(3, 20), model.new_cache(3, 20, dtype=kind)
    with torch.no_grad():
        for cache in (plain, stored):
            model(ids[:, :PROMPT], cache=cache)
    exact, layer = plain.layers[0], stored.layers[0]
    for x, scale in ((exact.keys, layer.k_scale), (exact.values, layer.v_scale)):
        absmax = x[:, :PROMPT].abs().amax((1, 3))
        torch.testing.assert_close(scale, absmax * MARGIN[kind] / LARGEST[kind])
    fixed = [x.clone() for x in layer[4:]]
    read(model, 3 + ids % 7, stored)  # goes on
    assert all(map(torch.equal, layer[4:], fixed))
    stored.reset()
    assert not any(scale.any() for layer in stored.layers for scale in layer[4:])


@KINDS
def test_logits(kind: torch.dtype, model: GPT, ids: torch.Tensor) -> None:
    """Off by the rounding of keys and values: less than a tenth of what the logits vary by."""
    exact = read(model, ids, model.new_cache(3, 20))
    cache = model.new_cache(3, 20, dtype=kind)
    assert cache.layers[0].keys.dtype == kind
    error = read(model, ids, cache) - exact
    assert 0 < error.square().mean().sqrt() < 0.1 * exact.std()


@KINDS
def test_sequences_keep_their_scales(kind: torch.dtype, model: GPT, ids: torch.Tensor) -> None:
    """Where sequences change places, the next logits do, to the bit."""
    rows, next_ids = torch.tensor([2, 0, 0], device=ids.device), ids[:1, -1:].expand(3, -1)

    def prompted() -> KVCache:
        cache = model.new_cache(3, 20, dtype=kind)
        model(ids[:, :PROMPT] * torch.tensor([[1], [0], [1]], device=ids.device), cache=cache)
        return cache

    with torch.no_grad():
        reordered, filled, placed = prompted(), *(model.new_cache(3, 20, dtype=kind) for _ in "ab")
        reordered.reorder(rows)
        filled.fill(prompted(), rows)
        order = torch.tensor([1, 2, 0], device=ids.device)
        placed.place(prompted(), order)
        logits = model(next_ids, cache=prompted())
        for cache, places in ((reordered, rows), (filled, rows), (placed, order.argsort())):
            assert torch.equal(model(next_ids, cache=cache), logits[places])


def test_errors(model: GPT) -> None:
    with pytest.raises(
        ValueError, match=r"dtype must be torch.int8 or torch.float8_e4m3fn, or None"
    ):
        model.new_cache(1, 4, dtype=torch.float16)
    plain, stored = model.new_cache(1, 4), model.new_cache(1, 4, dtype=torch.int8)
    for name in ("fill", "place"):
        with pytest.raises(
            ValueError, match=r"source must hold torch.int8 .* it holds torch.float32"
        ):
            getattr(stored, name)(plain, torch.tensor([0]))
        with pytest.raises(ValueError, match=r"source must hold torch.float32 .* torch.int8"):
            getattr(plain, name)(stored, torch.tensor([0]))


def test_a_bias_refuses(model: GPT) -> None:
    """The plain operations that it needs do not read 8-bit numbers."""
    layer, attention = model.new_cache(1, 4, dtype=torch.int8).layers[0], model.blocks[0].attention
    x = torch.zeros(1, 1, model.config.n_embd, device=model.device)
    with pytest.raises(ValueError, match="and no 8-bit numbers"):
        attention(x, cache=layer, bias=torch.zeros(1, 1, 1, 1, device=model.device))
