"""T5's relative position bias as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.nn.checks import check_integer, check_positive


class RelativePositionBias(torch.nn.Module):
    """What is added to the scores by how far a key is from the query, learnt for each head.

    Distances are sorted into buckets: the near ones have a bucket each, farther ones share theirs
    with more and more others, logarithmically up to ``max_distance``, and all beyond have the last
    (Raffel et al. 2020, arXiv:1910.10683, section 2.1). Half of the buckets are for keys after
    the query, unless the attention is causal. ``weight`` is (num_buckets, num_heads).

    Args:
        num_heads: of the attention.
        num_buckets: even if bidirectional; at least two a direction.
        max_distance: more than half of a direction's buckets.
        bidirectional: whether there are keys after the query.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        *,
        bidirectional: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("num_heads", num_heads)
        directions = 2 if bidirectional else 1
        check_integer("num_buckets", num_buckets, at_least=2 * directions)
        if num_buckets % directions:
            raise ValueError(f"num_buckets must be even if bidirectional, got {num_buckets}")
        least = num_buckets // directions // 2 + 1
        check_integer("max_distance", max_distance, at_least=least)
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = torch.nn.Parameter(
            torch.empty(num_buckets, num_heads, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, of standard deviation 1."""
        torch.nn.init.normal_(self.weight)

    def forward(self, seqlen_q: int, seqlen_k: int, first: Tensor | int = 0) -> Tensor:
        """The bias for `fastattn.attention`: (1 or batch, num_heads, seqlen_q, seqlen_k).

        The keys have the positions 0 to seqlen_k - 1, the queries those from ``first`` on: a
        number, or (batch,) integers. Nothing of it waits for a GPU.
        """
        if isinstance(first, Tensor):
            first = first.unsqueeze(-1)
        # A diagonal has one distance: all of them in order, of which each query has a part.
        distances = torch.arange(1 - seqlen_q, seqlen_k, device=self.weight.device) - first
        values = torch.nn.functional.embedding(self.buckets(distances), self.weight)
        values = values.movedim(-1, -2)  # (batch, num_heads, seqlen_q + seqlen_k - 1)
        if values.dim() == 2:
            values = values.unsqueeze(0)
        return values.unfold(-1, seqlen_k, 1).flip(-2)

    def buckets(self, distances: Tensor) -> Tensor:
        """The bucket of each key position less query position; integers, any shape."""
        count = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        after = (distances > 0) * count if self.bidirectional else 0
        distances = distances.abs() if self.bidirectional else (-distances).clamp(min=0)
        near = count // 2
        # In float32, and in this order, so that borders fall where T5's do.
        ratio = torch.log(distances.clamp(min=near).float() / near)
        far = near + (ratio / math.log(self.max_distance / near) * (count - near)).long()
        return after + torch.where(distances < near, distances, far.clamp(max=count - 1))

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return (
            f"num_heads={heads}, num_buckets={buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )
