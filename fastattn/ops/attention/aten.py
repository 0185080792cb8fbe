"""The `torch` backend of attention: F.scaled_dot_product_attention where it has our semantics.

Two things differ and are bridged here without ever building a seqlen_q x seqlen_k matrix:

- its `is_causal` is aligned top-left, ours bottom-right: the two agree for square problems; a
  single query sees every key; otherwise queries are taken in chunks, each with a mask of its rows;
- it lets NaN in masked keys and values through (0 * NaN): on the CPU each sequence is cut to its
  length, elsewhere, where reading the lengths would stall the device, the padding is zeroed.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.attention.reference import visible, within

# Rows of one mask: 512 rows of a 16k context are 8 MB, and large enough for ATen's own blocking.
CHUNK = 512


def unsupported(problem: AttentionProblem) -> str | None:
    if problem.transformed:
        return "ATen's fused attention has no forward-mode, batching or second derivative"
    if problem.is_empty:
        return "ATen's fused attention is undefined for empty tensors"
    if problem.return_lse:
        if problem.device.type != "cpu":
            return "ATen returns the LSE in our form on the CPU alone"
        if problem.needs_grad:
            return "ATen's fused attention drops the gradient of the LSE"
        if problem.dropout_p:
            return "ATen's fused attention on the CPU has no dropout with the LSE"
    return None


def attention(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D)
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    compiling = torch.compiler.is_compiling()
    if mask is None and (not problem.causal or seqlen_q in (1, seqlen_k)):
        # A branch, not `and`: under torch.compile(dynamic=True) that would be a symbol, not a bool.
        is_causal = False if seqlen_q == 1 else problem.causal
        if key_lengths is None:
            return _sdpa(problem, q, k, v, is_causal=is_causal)
        if q.device.type == "cpu" and not compiling:
            # Top-left alignment keeps the diagonal of the uncut square problem.
            lengths = [max(0, n) for n in key_lengths.tolist()]
            sequences = [
                _cut(problem, q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], is_causal)
                for b, n in enumerate(lengths)
            ]
            return _joined(sequences, out_dim=0, lse_dim=0)
    if key_lengths is not None:
        padding = ~within(key_lengths, seqlen_k)[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    if compiling or not problem.causal:  # compiled, a loop would tie the graph to the length
        return _masked(problem, q, k, v, visible(problem, mask, key_lengths, q.device))

    each_row_sees = mask is None and key_lengths is None and seqlen_k > seqlen_q
    if each_row_sees and seqlen_q <= CHUNK and type(q) is torch.Tensor:
        return _sdpa(problem, q, k, v, attn_mask=_lower_right(seqlen_q, seqlen_k, q.device))
    chunks = []
    for start in range(0, seqlen_q, CHUNK):
        rows = slice(start, min(start + CHUNK, seqlen_q))
        # Keys past the chunk's last diagonal are seen by none of its rows.
        end = max(1, rows.stop + seqlen_k - seqlen_q)
        parts = q[:, :, rows], k[:, :, :end], v[:, :, :end]
        seen = visible(problem, mask, key_lengths, q.device, rows)[..., :end]
        if each_row_sees:
            chunks.append(_sdpa(problem, *parts, attn_mask=seen))
        else:
            chunks.append(_masked(problem, *parts, seen))
    return _joined(chunks, out_dim=1, lse_dim=2)


@functools.lru_cache(maxsize=4)
def _lower_right(seqlen_q: int, seqlen_k: int, device: torch.device) -> torch.Tensor:
    """The causal mask of a chunk of queries, at most CHUNK rows; kept, for small ones cost most."""
    with torch.inference_mode(False):  # such a tensor could not be saved for a backward
        seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        return seen.tril(seqlen_k - seqlen_q)


def _joined(
    parts: list[tuple[torch.Tensor, torch.Tensor | None]], out_dim: int, lse_dim: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Parts of the batch, or of the queries, in one tensor."""
    if len(parts) == 1:
        return parts[0]
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts], out_dim), torch.cat(lses, lse_dim) if lses else None


def _cut(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One sequence without its padding, of which nothing may be left."""
    if k.shape[2]:
        return _sdpa(problem, q, k, v, is_causal=is_causal)
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    out = q.masked_fill(everywhere, 0.0).transpose(1, 2)  # a function of q, with gradient zero
    if not problem.return_lse:
        return out, None
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_full(q.shape[:3], float("-inf"), dtype=precision)


def _masked(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention under a boolean mask; a row that sees no key gives 0 and LSE -inf.

    What ATen's kernels do with such a row differs by kernel and by gradient, so they are shown a
    key there, and the row is zeroed afterwards.
    """
    blind = ~seen.any(-1, keepdim=True)  # (B|1, H|1, rows|1, 1)
    out, lse = _sdpa(problem, q, k, v, attn_mask=seen | blind)
    out = out.masked_fill(blind.transpose(1, 2), 0.0)
    if lse is not None:
        lse = lse.masked_fill(blind.squeeze(-1), float("-inf"))
    return out, lse


def _sdpa(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    grouped = False
    if problem.heads != problem.kv_heads:  # a branch, not a value: torch.compile specialises on it
        grouped = True
    if not problem.return_lse:
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask,
            problem.dropout_p,
            is_causal,
            scale=problem.softmax_scale,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2), None
    if grouped:
        k, v = (x.repeat_interleave(problem.group_size, dim=1) for x in (k, v))
    if attn_mask is not None:
        attn_mask = q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=problem.softmax_scale
    )
    return out.transpose(1, 2), lse
