"""Attention over parts of the keys, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastattn.ops.common import modes
from fastattn.ops.common.dense import BY_ROWS, check_dense


def merge_attention_states(
    out: Sequence[torch.Tensor] | torch.Tensor, lse: Sequence[torch.Tensor] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from the results over disjoint parts of them.

        lse = log sum_n exp(lse_n),  out = sum_n exp(lse_n - lse) out_n

    With `return_lse=True` each part's call gives its pair; how the keys were divided (a cache and
    new keys, chunks on several devices) does not matter. Differentiable, also through the LSEs. A
    part in which a query sees no key (LSE -inf) has no weight, whatever stands in its out; if that
    holds for all of them the result is 0 with LSE -inf. (Rabe and Staats 2021, arXiv:2112.05682.)

    Args:
        out: n tensors (batch, seqlen_q, heads, head_dim), or packed (total_q, heads, head_dim), of
            one shape and dtype; or one tensor with the parts stacked in dimension 0.
        lse: n tensors (batch, heads, seqlen_q), or (heads, total_q), floating point; likewise.

    Returns:
        (out, lse) in the shapes and dtypes of one part.

    Raises:
        TypeError, ValueError: the parts do not fit; the message says which.
    """
    outs, lses = _stacked("out", out), _stacked("lse", lse)
    if not outs.is_floating_point() or not lses.is_floating_point():
        raise TypeError(f"out and lse must be floating point; got {outs.dtype} and {lses.dtype}")
    if outs.dim() not in (4, 5) or lses.dim() != outs.dim() - 1:
        raise ValueError(
            "each out must have the shape (batch, seqlen_q, heads, head_dim) and its lse (batch, "
            "heads, seqlen_q), or without batch when packed; got "
            f"{tuple(outs.shape[1:])} and {tuple(lses.shape[1:])}"
        )
    expected = (*outs.shape[:-3], outs.shape[-2], outs.shape[-3])
    if tuple(lses.shape) != expected:
        raise ValueError(
            f"{outs.shape[0]} outs of shape {tuple(outs.shape[1:])} need as many lses of shape "
            f"{expected[1:]}; got {lses.shape[0]} of shape {tuple(lses.shape[1:])}"
        )
    if not outs.shape[0]:
        raise ValueError("out and lse must have at least one part")
    precision = modes.at_least_float32(outs.dtype)
    top = lses.detach().amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    # Zeros, not only weights of 0: 0 * NaN would reach the result, or the gradients.
    unseen = lses == float("-inf")
    weights = torch.exp(lses - top).masked_fill(unseen, 0.0)
    outs = outs.masked_fill(unseen.transpose(-1, -2).unsqueeze(-1), 0.0)
    total = weights.sum(0)
    nothing = total == 0.0
    total = total.masked_fill(nothing, 1.0)
    share = (weights / total).transpose(-1, -2).unsqueeze(-1).to(precision)
    merged = (share * outs.to(precision)).sum(0).to(outs.dtype)
    return merged, (top + total.log()).masked_fill(nothing, float("-inf"))


def _stacked(name: str, parts: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    if isinstance(parts, torch.Tensor):
        return check_dense(name, parts, BY_ROWS)
    parts = list(parts)
    if not parts or not all(isinstance(x, torch.Tensor) for x in parts):
        raise TypeError(f"{name} must be a tensor or a sequence of at least one tensor")
    for n, x in enumerate(parts):
        check_dense(f"{name}[{n}]", x, BY_ROWS)
    shapes = {(tuple(x.shape), x.dtype, x.device) for x in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"the parts of {name} must have one shape, dtype and device; got "
            + ", ".join(
                f"{shape} {dtype} on {device}" for shape, dtype, device in sorted(shapes, key=str)
            )
        )
    return torch.stack(parts)
