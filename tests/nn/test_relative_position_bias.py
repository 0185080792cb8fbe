"""nn.RelativePositionBias against transformers' T5, and in attention with its gradient."""

from __future__ import annotations

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

import fastattn
from fastattn.nn import Attention, KeyValueCache, RelativePositionBias
from oracle import assert_close_to_reference


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (12, 37), (4, 3), (64, 64)])
def test_buckets_are_t5s(bidirectional: bool, buckets: int, distance: int) -> None:
    module = RelativePositionBias(1, buckets, distance, bidirectional=bidirectional)
    distances = torch.arange(-3 * distance, 3 * distance)
    expected = T5Attention._relative_position_bucket(distances, bidirectional, buckets, distance)
    assert torch.equal(module.buckets(distances), expected)


def _plain(module: RelativePositionBias, queries: torch.Tensor, keys: int) -> torch.Tensor:
    """queries (batch, seqlen_q) positions -> (batch, heads, seqlen_q, keys), one by one."""
    distances = torch.arange(keys) - queries[..., None]
    return module.weight[module.buckets(distances)].movedim(-1, 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (17, 9), (5, 40), (1, 23)])
def test_each_query_and_key_has_the_bias_of_its_distance(
    bidirectional: bool, seqlen_q: int, seqlen_k: int
) -> None:
    module = RelativePositionBias(3, 8, 20, bidirectional=bidirectional)
    ahead = torch.arange(seqlen_q)
    assert torch.equal(module(seqlen_q, seqlen_k), _plain(module, ahead[None], seqlen_k))
    first = torch.tensor([0, 7, 19])
    got = module(seqlen_q, seqlen_k, first)
    assert torch.equal(got, _plain(module, first[:, None] + ahead, seqlen_k))
    assert torch.equal(module(seqlen_q, seqlen_k, 7)[0], got[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_through_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = RelativePositionBias(2, 8, 20, dtype=dtype)
    q, k, v = (torch.randn(2, n, 2, 16, dtype=dtype) for n in (13, 21, 21))
    upstream = torch.randn_like(q)

    def gradient(wide: torch.dtype, fused: bool) -> torch.Tensor:
        weight = module.weight.detach().to(wide).requires_grad_()
        if fused:
            bias = torch.func.functional_call(module, {"weight": weight}, (13, 21))
            out = fastattn.attention(q, k, v, bias=bias, softmax_scale=1.0)
        else:
            distances = torch.arange(21) - torch.arange(13)[:, None]
            bias = weight[module.buckets(distances)].movedim(-1, 0)
            heads = (x.to(wide).transpose(1, 2) for x in (q, k, v))
            scores = next(heads) @ next(heads).mT + bias
            out = (scores.softmax(-1) @ next(heads)).transpose(1, 2)
        return torch.autograd.grad(out, weight, upstream.to(wide))[0]

    ours, eager, exact = (
        gradient(dtype, True), gradient(dtype, False), gradient(torch.float64, False)
    )  # fmt: skip
    assert_close_to_reference(ours, eager, exact, name="gradient of the table")


@pytest.mark.long
def test_compiles_in_one_graph_for_all_lengths() -> None:
    module = RelativePositionBias(2, bidirectional=False)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    first = torch.tensor([3, 50])
    for seqlen in (9, 14):
        torch.testing.assert_close(compiled(seqlen, 60, first), module(seqlen, 60, first))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0,), {}, "num_heads must be positive"),
        ((2, 7), {}, "num_buckets must be even if bidirectional, got 7"),
        ((2, 2), {}, "num_buckets must be at least 4"),
        ((2, 1), {"bidirectional": False}, "num_buckets must be at least 2"),
        ((2, 32, 8), {}, "max_distance must be at least 9, got 8"),
    ],
)
def test_refuses(args: tuple[int, ...], kwargs: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativePositionBias(*args, **kwargs)


# --- with the cache of an attention --------------------------------------------------------------


def _cache(rows: int, heads: int, head_dim: int) -> KeyValueCache:
    keys, values = torch.full((2, rows, 30, heads, head_dim), torch.nan)
    return KeyValueCache(keys, values, torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("slots", [13, 30])  # as many as there are keys, or all
@torch.no_grad()
def test_attention_with_a_cache_and_a_bias(slots: int) -> None:
    torch.manual_seed(0)
    module = Attention(24, 4, num_kv_heads=2, softmax_scale=1.0).eval()
    bias, x = RelativePositionBias(4, 8, 20, bidirectional=False), torch.randn(3, 13, 24)
    whole = module(x, causal=True, bias=bias(13, 13))
    cache, parts = _cache(3, 2, 6), []
    for part in x.split([1, 5, 1, 6], 1):
        seqlen = part.shape[1]
        added = bias(seqlen, slots, cache.lengths)
        parts.append(module(part, causal=True, cache=cache, bias=added))
        cache.lengths.add_(seqlen)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_a_bias_with_a_cache_refuses() -> None:
    x, bias = torch.randn(1, 2, 24), torch.zeros(1, 4, 2, 2)
    cache = _cache(1, 4, 6)
    table = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="no pages, window or context"):
        Attention(24, 4).eval()(x, cache=cache._replace(block_table=table), bias=bias)
    with pytest.raises(ValueError, match="no pages, window or context"):
        Attention(24, 4, window=(2, 0)).eval()(x, cache=cache, bias=bias)
    with pytest.raises(ValueError, match="no pages, window or context"):
        Attention(24, 4, cross=True).eval()(x, cache, bias=bias)
    with pytest.raises(ValueError, match="key_lengths and mask must be None with a cache"):
        Attention(24, 4, cross=True).eval()(x, cache, key_lengths=cache.lengths)
    with pytest.raises(ValueError, match=r"dropout=0\.5 in training mode"):
        Attention(24, 4, cross=True, dropout=0.5)(x, cache)
