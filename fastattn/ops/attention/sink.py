"""The gradient of an attention sink, which follows from what the backward kernels have anyway."""

from __future__ import annotations

import torch


def gradient(lse: torch.Tensor, delta: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """-sum over rows of exp(sink - lse) delta: the sink's share of the softmax, without a value.

    Args:
        lse: float32 (batch, heads, seqlen_q), or (heads, total_q) of a packed call.
        delta: rowsum(dout * out) - dlse, as many numbers in the same order.
        sink: (heads,), whose dtype the result has.
    """
    share = torch.exp(sink.float()[:, None] - lse)
    # Rows of no sequence have LSE -inf, and what their delta is made of may be anything.
    rows = torch.where(lse == float("-inf"), 0.0, share * delta.view(lse.shape))
    return -rows.sum(-1 if rows.dim() == 2 else (0, 2)).to(sink.dtype)
