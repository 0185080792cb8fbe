"""The definition of attention: plain differentiable PyTorch, read as the formula.

    s = softmax_scale * q k^T, -inf where a key may not be seen
    p = softmax(s), out = dropout(p) v, lse = log sum exp(s)

Computed in float64 for float64 inputs, else in float32, and rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import modes


def unsupported(problem: AttentionProblem) -> str | None:
    return None


def attention(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if modes.autocast_dtype(q.device.type) is None:
        return _attention(problem, q, k, v, mask, key_lengths)
    # Autocast has rounded the inputs already, and has no say in the precision of the definition.
    with torch.autocast(q.device.type, enabled=False):
        return _attention(problem, q, k, v, mask, key_lengths)


def _attention(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(precision).transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
    if key_lengths is not None:
        # Zeros, not only a mask: 0 * NaN of the padding would reach outputs and gradients.
        padding = ~within(key_lengths, problem.seqlen_k)[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    if problem.group_size != 1:
        k, v = (x.repeat_interleave(problem.group_size, dim=1) for x in (k, v))

    scores = problem.softmax_scale * (q @ k.transpose(-2, -1))  # (B, H, Sq, Sk)
    seen = visible(problem, mask, key_lengths, q.device)
    scores = scores.masked_fill(~seen, float("-inf"))

    # A row that sees no key: the maximum is -inf and the sum 0; both are made harmless.
    if problem.seqlen_k:
        top = scores.detach().amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0.0)
    else:
        top = scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)

    probabilities = F.dropout(weights / total, problem.dropout_p)
    out = (probabilities @ v).transpose(1, 2).to(problem.dtype)
    lse = (top + total.log()).masked_fill(blind, float("-inf")).squeeze(-1)
    return out, lse


def within(key_lengths: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """(batch, seqlen_k), True for the keys that are not padding."""
    return torch.arange(seqlen_k, device=key_lengths.device) < key_lengths[:, None]


def visible(
    problem: AttentionProblem,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    device: torch.device,
    rows: slice = slice(None),
) -> torch.Tensor:
    """Which keys the queries `rows` see: 4-D, broadcastable to (B, H, rows, Sk).

    The causal diagonal is aligned bottom-right; for seqlen_q = 3, seqlen_k = 5:

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1
    """
    j = torch.arange(problem.seqlen_k, device=device)
    seen = torch.ones_like(j, dtype=torch.bool)[None, None, None]
    if mask is not None:
        seen = mask if mask.shape[2] == 1 else mask[:, :, rows]
    if problem.causal:
        i = torch.arange(problem.seqlen_q, device=device)[rows]
        diagonal = j <= i[:, None] + (problem.seqlen_k - problem.seqlen_q)
        seen = seen & diagonal
    if key_lengths is not None:
        seen = seen & within(key_lengths, problem.seqlen_k)[:, None, None, :]
    return seen
