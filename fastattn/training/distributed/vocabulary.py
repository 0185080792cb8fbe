"""The vocabulary in parts: an embedding, a head and a loss of which each process has some rows.

The logits (N, V) are never there as a whole: a process has the columns of its own tokens, and these
of a few rows at a time. A row's loss takes three numbers from each process: the largest score, the
sum of exponentials, and the target's score where the target is among its tokens (Shoeybi et al.
2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.ops.common import modes
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.distributed.collectives import Group, entering, leaving, summed

SCORES = 1 << 24  # of a process at one time: 64 MiB in float32


def parts_of(vocab_size: int, count: int) -> list[int]:
    """The rows of each process, as `torch.distributed.tensor.Shard` cuts: the last ones have fewer.

    Raises:
        ValueError: one would have none.
    """
    most = -(-vocab_size // count)
    if (count - 1) * most >= vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens leaves the last of tensor={count} processes "
            f"without any, for each of the others has {most}: take fewer processes"
        )
    return [min(most, vocab_size - rank * most) for rank in range(count)]


def embedding(
    ids: Tensor, weight: Tensor, first: int, group: Group, padding: int | None = None
) -> Tensor:
    """The rows of a table that lie on several processes: ids (...) -> (..., C).

    Args:
        weight: (rows of this process, C).
        first: the token of its first row.
        padding: the token whose row gets no gradient, as `torch.nn.Embedding` has it.
    """
    local = ids - first
    elsewhere = (local < 0) | (local >= len(weight))
    if padding is not None:
        padding = padding - first if 0 <= padding - first < len(weight) else None
    rows = F.embedding(local.masked_fill(elsewhere, 0), weight, padding)
    return leaving(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), group)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    first: int,
    group: Group,
    softcap: float = 0.0,
) -> Tensor:
    """`fastattn.linear_cross_entropy` of a head whose rows lie on several processes: the mean.

    The products have the inputs' dtype, under autocast its dtype; the rest is float32, for float64
    float64. The backward makes the scores again.

    Args:
        x: (..., C), the same on all processes.
        weight, bias: (rows of this process, C) and (rows,).
        targets: (...), tokens of the whole vocabulary, or -100 where none counts.
        first: the token of this process' first row.
        softcap: the scores are softcap * tanh(logits / softcap); 0: the logits.

    Returns:
        A scalar, the same on all processes; NaN if no target counts, with gradients of 0.
    """
    dtype = modes.autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = modes.cast(x, dtype), modes.cast(weight, dtype)
        bias = None if bias is None else modes.cast(bias, dtype)
    targets = targets.flatten()
    counts = targets != IGNORED
    # A place among this process' rows, -1 where the target is elsewhere or does not count.
    local = torch.where(counts, targets - first, -1)
    local = local.masked_fill(local >= len(weight), -1).clamp(min=-1)
    rows = entering(x.flatten(0, -2), group)
    losses = _Losses.apply(rows, weight, bias, local, softcap, group)
    total = losses.masked_fill(~counts, 0.0).sum()
    count = counts.sum().to(total.dtype)
    return (total / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


class _Losses(torch.autograd.Function):
    """Of rows (N, C) -> (N,): log sum exp(scores) - score of the target."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        local: Tensor,
        softcap: float,
        group: Group,
    ) -> Tensor:
        lse, of_target = [], []
        for some in _pieces(x, weight):
            scores = _scores(x[some], weight, bias, softcap)
            lse.append(scores.logsumexp(-1))
            own = local[some].clamp(min=0).unsqueeze(-1)
            own = scores.gather(-1, own).squeeze(-1)
            of_target.append(own.masked_fill(local[some] < 0, 0.0))
        here = torch.cat(lse)
        largest = here.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        sums = summed(torch.stack([(here - largest).exp(), torch.cat(of_target)]), group)
        whole = largest + sums[0].log()
        ctx.save_for_backward(x, weight, bias, local, whole)
        ctx.softcap = softcap
        return whole - sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, local, lse = ctx.saved_tensors
        dx = torch.empty_like(x)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=lse.dtype)
        for some in _pieces(x, weight):
            scores = _scores(x[some], weight, bias, ctx.softcap)
            d_scores = (scores - lse[some].unsqueeze(-1)).exp_()
            hits = (local[some] >= 0).nonzero().squeeze(-1)
            d_scores[hits, local[some][hits]] -= 1.0
            d_scores *= grad[some].unsqueeze(-1)
            if ctx.softcap:
                d_scores *= 1.0 - (scores / ctx.softcap).square()
            if d_bias is not None:
                d_bias += d_scores.sum(0)
            d_logits = d_scores.to(x.dtype)
            dx[some] = d_logits @ weight
            d_weight += d_logits.t() @ x[some]
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return dx, d_weight.to(weight.dtype), d_bias, None, None, None


def _pieces(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """All rows of x, so many at a time that there are not more than SCORES scores."""
    size = max(1, SCORES // len(weight))
    return (slice(start, start + size) for start in range(0, len(x), size))


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    logits = F.linear(x, weight, bias)
    scores = logits.to(modes.at_least_float32(logits.dtype))
    return softcap * torch.tanh(scores / softcap) if softcap else scores
