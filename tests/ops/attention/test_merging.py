"""Merging partial results of attention: it is attention on all keys, with its gradient."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn import merge_attention_states
from fastattn.ops.attention import tiles
from oracle import assert_close_to_reference


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64))
def test_merge_is_attention_on_all_keys(dtype: torch.dtype) -> None:
    q = torch.randn(2, 6, 4, 16).to(dtype)
    k, v = torch.randn(2, 2, 30, 2, 16).to(dtype)
    mask = torch.rand(2, 1, 6, 30) > 0.4
    mask[:, :, 0] = False  # a row without a key
    mask[:, :, 1, :10] = False  # a part without a key

    def part(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return fastattn.attention(
            q, k[:, keys], v[:, keys], mask=mask[..., keys], return_lse=True, backend="reference"
        )

    parts = [part(slice(a, b)) for a, b in ((0, 10), (10, 11), (11, 30))]
    out, lse = merge_attention_states([p[0] for p in parts], [p[1] for p in parts])
    exact = fastattn.attention(
        q.double(), k.double(), v.double(), mask=mask, return_lse=True, backend="reference"
    )
    eager = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend="reference")
    assert out.dtype == dtype
    assert_close_to_reference(out, eager[0], exact[0], ulps=8, name="out")
    assert_close_to_reference(lse, eager[1], exact[1], ulps=8, name="lse")
    stacked = merge_attention_states(*(torch.stack(x) for x in zip(*parts)))
    assert torch.equal(stacked[0], out) and torch.equal(stacked[1], lse)


def test_merge_has_the_gradient_of_the_whole() -> None:
    """Also through the LSEs, and where a part has no key."""
    q, k, v = (torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        pairs = [
            fastattn.attention(q, k[:, s], v[:, s], mask=seen[:, s], return_lse=True)
            for s in (slice(0, 2), slice(2, 5))
        ]
        out, lse = merge_attention_states([p[0] for p in pairs], [p[1] for p in pairs])
        return out.square().sum() + lse.square().sum()

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
        return out.square().sum() + lse.square().sum()

    for ours, expected in zip(
        torch.autograd.grad(merged(q, k, v), (q, k, v)),
        torch.autograd.grad(whole(q, k, v), (q, k, v)),
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_merge_leaves_out_what_has_no_weight(value: float) -> None:
    """A part with LSE -inf may hold anything: result and gradients are those without it."""
    g = torch.Generator().manual_seed(0)
    out = torch.randn(3, 2, 5, 4, 8, generator=g, dtype=torch.float64)
    lse = torch.randn(3, 2, 4, 5, generator=g, dtype=torch.float64)
    lse[1] = -math.inf
    lse[:, :, :, 0] = -math.inf  # a row without a key in any part
    spoilt = out.masked_fill((lse == -math.inf).mT[..., None], value)

    def merged(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results and their gradients; into the row without a key an infinite one arrives."""
        leaves = out.clone().requires_grad_(), lse.clone().requires_grad_()
        results = merge_attention_states(*leaves)
        g = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in results]
        cotangents[0][:, 0] = cotangents[1][:, :, 0] = math.inf
        return *results, *torch.autograd.grad(results, leaves, cotangents)

    ours, expected = merged(spoilt, lse), merged(out[[0, 2]], lse[[0, 2]])
    for name, x, y in zip(("out", "lse", "dout", "dlse"), ours, expected):
        if name.startswith("d"):
            assert (x[1] == 0).all()
            x = x[[0, 2]]
        assert torch.equal(x, y), name
    for x in (ours[0][:, 0], ours[2][:, :, 0], ours[3][:, :, :, 0]):
        assert (x == 0).all()
    assert (ours[1][:, :, 0] == -math.inf).all()


def test_merge_derivatives_where_a_part_has_no_key() -> None:
    out = torch.randn(3, 1, 2, 1, 2, dtype=torch.float64)
    lse = torch.randn(3, 1, 1, 2, dtype=torch.float64)
    lse[1, ..., 0] = -math.inf
    out[1, :, 0] = math.nan
    hidden = lse == -math.inf

    def function(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return merge_attention_states(
            out.masked_fill(hidden.mT[..., None], math.nan), lse.masked_fill(hidden, -math.inf)
        )

    leaves = out.nan_to_num().requires_grad_(), lse.masked_fill(hidden, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_merge_kernel_leaves_out_what_has_no_weight(device: str) -> None:
    """A row that sees no key of a split may have made 0 * NaN there."""
    from fastattn.ops.attention.triton import merge

    part, part_lse = torch.randn(3, 1, 2, 4, 16), torch.randn(3, 1, 4, 2)
    part_lse[1] = -math.inf
    part_lse[:, :, :, 0] = -math.inf
    expected = merge_attention_states(part, part_lse)
    part = part.masked_fill((part_lse == -math.inf).mT[..., None], math.nan)
    out, lse = torch.empty(1, 2, 4, 16, device=device), torch.empty(1, 4, 2, device=device)
    run = merge.prepared(out.shape, 700, 0, tiles.Split(3, 256, 1))
    run(part.to(device), part_lse.to(device), out, lse, None)
    torch.testing.assert_close((out.cpu(), lse.cpu()), expected)


def test_merge_errors() -> None:
    out, lse = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5)
    for bad, error, message in [
        ((out, lse[:2]), ValueError, "3 outs of shape .* got 2"),
        ((out, lse.mT), ValueError, "need as many lses of shape"),
        (([], []), TypeError, "at least one tensor"),
        (([out[0], out[1, :1]], list(lse[:2])), ValueError, "the parts of out must have one shape"),
        ((out[0, 0], lse[0, 0]), ValueError, "each out must have the shape"),
        ((out.int(), lse), TypeError, "floating point"),
    ]:
        with pytest.raises(error, match=message):
            merge_attention_states(*bad)
