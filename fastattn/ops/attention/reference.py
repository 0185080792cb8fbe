"""The definition of attention: plain differentiable PyTorch, read as the formula.

    s = softmax_scale * q k^T
    s = softcap * tanh(s / softcap)
    s = s - alibi_slope * |i + seqlen_k - seqlen_q - j| + bias
    s = -inf where a key may not be seen
    p = exp(s) / (sum exp(s) + exp(sink)),  lse = log(sum exp(s) + exp(sink))
    out = dropout(p) v

Computed in float64 for float64 inputs, else in float32, and rounded once at the end. A packed call
is computed on its sequences padded to the longest.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from fastattn.ops.attention import block_mask
from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import dropout, modes


def forward(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    if problem.dropout_p and extras.dropout_seed is None:
        extras = extras._replace(dropout_seed=dropout.draw_seed(q.device))
    if modes.autocast_dtype(q.device.type) is None:
        return _forward(problem, q, k, v, extras)
    # Autocast has rounded the inputs already, and has no say in the precision of the definition.
    with torch.autocast(q.device.type, enabled=False):
        return _forward(problem, q, k, v, extras)


def _forward(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    precision = modes.at_least_float32(q.dtype)
    out, lse = formula(problem, q.to(precision), k.to(precision), v.to(precision), extras)
    return out.to(problem.dtype), lse


def formula(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), computed in the dtype of the tensors."""
    if problem.packed:
        return _packed(problem, q, k, v, extras)
    if extras.key_lengths is not None:
        # Zeros, not only a mask: 0 * NaN of the padding would reach outputs and gradients.
        padding = ~within(extras.key_lengths, problem.seqlen_k)[:, :, None, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    return _dense(problem, q, k, v, extras)


def on_lengths(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on the keys from `starts` to `lengths` (batch,), which the diagonal follows."""
    precision = modes.at_least_float32(q.dtype)
    q, k, v = q.to(precision), k.to(precision), v.to(precision)
    out, lse = formula_on_lengths(problem, q, k, v, extras, lengths, starts)
    return out.to(problem.dtype), lse


def formula_on_lengths(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`on_lengths`, computed in the dtype of the tensors."""
    j = torch.arange(k.shape[1], device=q.device)
    hidden = j >= lengths[:, None]
    if starts is not None:
        hidden = hidden | (j < starts[:, None])
    k, v = (x.masked_fill(hidden[:, :, None, None], 0.0) for x in (k, v))
    problem = dataclasses.replace(problem, seqlen_k=k.shape[1])
    extras = extras._replace(mask=~hidden[:, None, None])
    shift = (lengths - q.shape[1])[:, None, None, None]
    return _dense(problem, q, k, v, extras, shift)


def _dense(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    shift: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula. `shift`: seqlen_k - seqlen_q where it differs by sequence, (batch, 1, 1, 1)."""
    if shift is None:
        shift = problem.seqlen_k - problem.seqlen_q
    settings = problem.settings
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
    if problem.group_size != 1:
        k, v = (x.repeat_interleave(problem.group_size, dim=1) for x in (k, v))

    scores = settings.softmax_scale * (q @ k.transpose(-2, -1))  # (B, H, Sq, Sk)
    if settings.softcap:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    if extras.alibi_slopes is not None:
        scores = scores - alibi(problem, extras.alibi_slopes, shift=shift)
    if extras.bias is not None:
        scores = scores + extras.bias
    seen = visible(problem, extras, q.device, shift=shift)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))

    # A row that sees no key: the maximum is -inf and the sum 0; both are made harmless.
    top = q.new_full((*q.shape[:-1], 1), float("-inf"))
    if problem.seqlen_k:
        top = scores.detach().amax(-1, keepdim=True)
    unseen = top == float("-inf")
    sink = None if extras.sink is None else extras.sink.to(q.dtype)[:, None, None]
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    blind = top == float("-inf")
    top = top.masked_fill(blind, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    total = total.masked_fill(blind, 1.0)
    p = weights / total
    if settings.dropout_p:
        assert extras.dropout_seed is not None
        batch, heads, seqlen_q, seqlen_k = scores.shape
        kept = dropout.keep(
            extras.dropout_seed, settings.dropout_p, batch, heads, seqlen_q, seqlen_k
        )
        p = p * kept / (1.0 - settings.dropout_p)
    lse = (top + total.log()).masked_fill(blind, float("-inf")).squeeze(-1)
    # 0 there already, but so that p^T dO takes no gradient from such a row: it may be infinite.
    out = (p @ v).masked_fill(unseen, 0.0)
    return out.transpose(1, 2), lse


def _packed(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad, compute, pack. Without a loop over sequences, so that the lengths stay on the device."""
    cu_seqlens = extras.cu_seqlens_q
    assert cu_seqlens is not None and extras.cu_seqlens_k is not None
    q_tokens, q_lengths = _tokens(cu_seqlens, extras.seqused_q, problem.seqlen_q, q.shape[0])
    k_tokens, k_lengths = _tokens(
        extras.cu_seqlens_k, extras.seqused_k, problem.seqlen_k, k.shape[0]
    )
    if not (problem.batch and problem.seqlen_q and q.shape[0]):  # no token is in a sequence
        given = extras.bias, extras.sink, extras.alibi_slopes
        out = zeros_of(q, k, v, *given).to(q.dtype).expand(*q.shape[:2], v.shape[2])
        return out, q.new_full(q.shape[1::-1], float("-inf"))
    if not k.shape[0]:  # so that there is something to index, hidden as padding
        k, v = k.new_zeros(1, *k.shape[1:]) + k.sum(), v.new_zeros(1, *v.shape[1:]) + v.sum()
        if extras.k_documents is not None:
            extras = extras._replace(k_documents=extras.k_documents.new_zeros(1))
    q_padding = ~within(q_lengths, problem.seqlen_q)[:, :, None, None]
    k_padding = ~within(k_lengths, problem.seqlen_k)[:, :, None, None]
    padded = extras._replace(
        key_lengths=k_lengths,
        q_documents=None if extras.q_documents is None else extras.q_documents[q_tokens],
        k_documents=None if extras.k_documents is None else extras.k_documents[k_tokens],
    )
    out, lse = _dense(
        problem,
        q[q_tokens].masked_fill(q_padding, 0.0),
        k[k_tokens].masked_fill(k_padding, 0.0),
        v[k_tokens].masked_fill(k_padding, 0.0),
        padded,
        shift=(k_lengths - q_lengths)[:, None, None, None],
    )
    token = torch.arange(q.shape[0], device=q.device)
    starts = cu_seqlens.long()
    sequence = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    sequence = sequence.clamp(max=problem.batch - 1)
    place = token - starts[sequence]
    outside = (place < 0) | (place >= q_lengths[sequence])
    place = place.clamp(0, problem.seqlen_q - 1)
    out = out[sequence, place].masked_fill(outside[:, None, None], 0.0)
    lse = lse[sequence, :, place].masked_fill(outside[:, None], float("-inf"))
    return out, lse.transpose(0, 1)


def zeros_of(*tensors: torch.Tensor | None) -> torch.Tensor:
    """A zero that is a function of the tensors, with gradient zero, even where they hold NaN."""
    given = [x for x in tensors if x is not None]
    everywhere = torch.ones((), dtype=torch.bool, device=given[0].device)
    return torch.stack([x.double().masked_fill(everywhere, 0.0).sum() for x in given]).sum()


def _tokens(
    cu_seqlens: torch.Tensor, seqused: torch.Tensor | None, longest: int, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the padded sequences lie in the packed tensor, (batch, longest), and their lengths."""
    cu = cu_seqlens.long()
    lengths = cu.diff() if seqused is None else seqused.long()
    place = torch.arange(longest, device=cu.device)
    return (cu[:-1, None] + place).clamp(0, max(total - 1, 0)), lengths


def within(key_lengths: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """(batch, seqlen_k), True for the keys that are not padding."""
    return torch.arange(seqlen_k, device=key_lengths.device) < key_lengths[:, None]


def visible(
    problem: AttentionProblem,
    extras: Extras,
    device: torch.device,
    rows: slice = slice(None),
    columns: slice = slice(None),
    shift: int | torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Which of the keys `columns` the queries `rows` see, as a 4-D tensor that broadcasts to

    (batch, heads, rows, columns); None if they see all of them.

    The causal diagonal is aligned bottom-right unless it is top-left; for 3 queries on 5 keys:

        1 1 1 0 0           1 0 0 0 0
        1 1 1 1 0           1 1 0 0 0
        1 1 1 1 1           1 1 1 0 0
    """
    settings = problem.settings
    conditions = []
    if extras.mask is not None:
        conditions.append(cut(extras.mask, rows, columns))
    j = None
    if problem.bounded_left or problem.bounded_right or extras.key_lengths is not None:
        j = torch.arange(problem.seqlen_k, device=device)[columns]
    if j is not None and (problem.bounded_left or problem.bounded_right):
        if shift is None:
            shift = problem.seqlen_k - problem.seqlen_q
        i = torch.arange(problem.seqlen_q, device=device)[rows, None]
        diagonal = i if settings.top_left else i + shift
        if problem.bounded_right:
            conditions.append(_four_dimensional(j <= diagonal + settings.window_right))
        if problem.bounded_left:
            conditions.append(_four_dimensional(j >= diagonal - settings.window_left))
    if j is not None and extras.key_lengths is not None:
        conditions.append(j < extras.key_lengths[:, None, None, None])
    if extras.q_documents is not None and extras.k_documents is not None:
        same = extras.q_documents[:, rows, None] == extras.k_documents[:, None, columns]
        conditions.append(same[:, None])
    if extras.blocks is not None:
        sizes = settings.block_q, settings.block_k, problem.seqlen_q, problem.seqlen_k
        conditions.append(block_mask.dense(extras.blocks, *sizes)[:, :, rows, columns])
    return functools.reduce(torch.logical_and, conditions) if conditions else None


def _four_dimensional(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 4 else x[None, None]


def cut(x: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """`rows` and `columns` of a tensor in which those dimensions may be broadcast."""
    x = x if x.shape[2] == 1 else x[:, :, rows]
    return x if x.shape[3] == 1 else x[..., columns]


def alibi(
    problem: AttentionProblem,
    slopes: torch.Tensor,
    rows: slice = slice(None),
    columns: slice = slice(None),
    shift: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The numbers that ALiBi subtracts from scores: (batch|1, heads, rows, columns)."""
    if shift is None:
        shift = problem.seqlen_k - problem.seqlen_q
    i = torch.arange(problem.seqlen_q, device=slopes.device)[rows, None]
    j = torch.arange(problem.seqlen_k, device=slopes.device)[columns]
    return slopes[:, :, None, None] * (i + shift - j).abs()
