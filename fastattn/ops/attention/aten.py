"""The `torch` backend of attention: F.scaled_dot_product_attention where it has our semantics.

Some things differ and are bridged here without ever building a seqlen_q x seqlen_k matrix:

- its `is_causal` is aligned top-left, and all else that it knows is a mask, boolean or added:
  queries are taken in chunks, each on the keys that its window leaves, with a mask of its rows;
- it lets NaN in masked keys and values through (0 * NaN): on the CPU each sequence is cut to its
  length, elsewhere, where reading the lengths would stall the device, the padding is zeroed;
- it has no packed sequences in public: on the CPU they are computed one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from fastattn.ops.attention import block_mask
from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.attention.reference import alibi, cut, visible, within, zeros_of
from fastattn.ops.attention.sdpa import HALVES, SMALLEST, in_float32, sdpa
from fastattn.ops.common import modes

# Rows of one mask: 512 rows of a 16k context are 8 MB, and large enough for ATen's own blocking.
CHUNK = 512


def unsupported(problem: AttentionProblem) -> str | None:
    if problem.transformed:
        return "ATen's fused attention has no forward-mode, batching or second derivative"
    if problem.is_empty:
        return "ATen's fused attention is undefined for empty tensors"
    if problem.settings.softcap:
        return "ATen has no softcap"
    if "sink" in problem.given:
        return "ATen has no attention sink"
    if problem.packed:
        if problem.device.type != "cpu":
            return "ATen has no packed sequences; reading their lengths would stall the device"
        if modes.recorded():
            return "packed sequences go through ATen one by one, which cannot be compiled"
    if problem.return_lse:
        if problem.device.type != "cpu":
            return "ATen returns the LSE in our form only on the CPU"
        if problem.needs_grad:
            return "ATen's fused attention drops the gradient of the LSE"
        if problem.dropout_p:
            return "ATen's fused attention on the CPU has no dropout with the LSE"
        if problem.head_dim != problem.head_dim_v:
            return "ATen returns the LSE only where v has the head_dim of q"
    return None


def declined(problem: AttentionProblem) -> str | None:
    if problem.dtype == torch.float64 and problem.needs_grad:
        return "float64 is where derivatives are checked, and ATen's attention has no second one"
    return None


def forward(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if problem.packed:
        return _packed(problem, q, k, v, extras)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D)
    seqlen_q, seqlen_k, settings = problem.seqlen_q, problem.seqlen_k, problem.settings
    compiling = modes.recorded()
    key_lengths = extras.key_lengths
    if not problem.given or problem.given == ("key_lengths",):
        native = _native_causality(problem)
        if native is not None:
            if key_lengths is None:
                return _sdpa(problem, q, k, v, is_causal=native)
            if q.device.type == "cpu" and not compiling:
                # Top-left alignment keeps the diagonal of the uncut problem.
                lengths = [max(0, n) for n in key_lengths.tolist()]
                sequences = [
                    _cut(problem, q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], native)
                    for b, n in enumerate(lengths)
                ]
                return joined(sequences, out_dim=0, lse_dim=0)
    if key_lengths is not None:
        padding = ~within(key_lengths, seqlen_k)[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    bounded = problem.bounded_left or problem.bounded_right
    if compiling or not bounded:  # compiled, a loop would tie the graph to the length
        return _masked(problem, q, k, v, extras, slice(None), slice(None))

    shift = 0 if settings.top_left else seqlen_k - seqlen_q
    each_row_sees = seqlen_k >= seqlen_q and not settings.top_left
    if not problem.given and each_row_sees and seqlen_q <= CHUNK and type(q) is torch.Tensor:
        band = settings.window_left, settings.window_right
        return _sdpa(problem, q, k, v, attn_mask=_band(seqlen_q, seqlen_k, *band, q.device))
    chunks = []
    for start in range(0, seqlen_q, CHUNK):
        rows = slice(start, min(start + CHUNK, seqlen_q))
        # Keys outside of the band of the chunk's rows are seen by none of them.
        begin, end = 0, seqlen_k
        if problem.bounded_right:
            end = min(end, rows.stop + shift + settings.window_right)
        if problem.bounded_left:
            begin = max(begin, rows.start + shift - settings.window_left)
        end = max(1, end)
        begin = min(begin, end - 1)
        parts = q[:, :, rows], k[:, :, begin:end], v[:, :, begin:end]
        chunks.append(_masked(problem, *parts, extras, rows, slice(begin, end)))
    return joined(chunks, out_dim=1, lse_dim=2)


def on_cache(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    b: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sequences of a padded batch from `b` on, as many as q has, on keys of their own.

    Their number is the batch of q, k and v; only one if `extras` differ by sequence.
    """
    if not k.shape[1]:
        lse = None
        if problem.return_lse:
            precision = modes.at_least_float32(q.dtype)
            shape = q.shape[0], problem.heads, q.shape[1]
            lse = q.new_full(shape, float("-inf"), dtype=precision)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    if problem.seqlen_q == 1 and not problem.given:
        return _one_query(problem, q, k, v)
    one, its = _alone(problem, extras, b, slice(0, q.shape[1]), slice(0, k.shape[1]))
    return forward(dataclasses.replace(one, batch=q.shape[0]), q, k, v, its)


def _one_query(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A query at the end of the keys, which sees all that its window leaves: no mask, no causality.

    The heads that share a key head are its queries, so that it is read once for all of them.
    """
    if problem.bounded_left:
        begin = max(0, k.shape[1] - 1 - problem.settings.window_left)
        k, v = k[:, begin:], v[:, begin:]
    batch, _, heads, head_dim = q.shape
    q = q.reshape(batch, problem.kv_heads, problem.group_size, head_dim)
    out, lse = _sdpa(problem, q, k.transpose(1, 2), v.transpose(1, 2))
    lse = None if lse is None else lse.reshape(batch, heads, 1)
    return out.transpose(1, 2).reshape(batch, 1, heads, v.shape[3]), lse


def _native_causality(problem: AttentionProblem) -> bool | None:
    """`is_causal` of ATen for a problem without masks, None if it has no word for it."""
    settings = problem.settings
    if problem.bounded_left or settings.window_right > 0:
        return None
    if not problem.bounded_right:
        return False
    if settings.top_left:
        return True
    # Branches, not `or`: under torch.compile(dynamic=True) that would be a symbol, not a bool.
    if problem.seqlen_q == 1:
        return False
    if problem.seqlen_q == problem.seqlen_k:
        return True
    return None


@functools.lru_cache(maxsize=4)
def _band(
    seqlen_q: int, seqlen_k: int, left: int, right: int, device: torch.device
) -> torch.Tensor:
    """A window's mask for at most CHUNK rows; kept, for small ones cost most."""
    with torch.inference_mode(False):  # such a tensor could not be saved for a backward
        seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        if right >= 0:
            seen = seen.tril(seqlen_k - seqlen_q + right)
        return seen.triu(seqlen_k - seqlen_q - left) if left >= 0 else seen


def joined(
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
    out = zeros_of(q, k, v).to(q.dtype).expand(*q.shape[:3], v.shape[3]).transpose(1, 2)
    if not problem.return_lse:
        return out, None
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_full(q.shape[:3], float("-inf"), dtype=precision)


def _masked(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    rows: slice,
    columns: slice,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries `rows` on keys `columns` under a mask; a row that sees no key gives 0 and LSE -inf.

    On the CPU ATen gives 0 as well. Its other kernels, and its LSE, differ: they are shown a key
    there. The row is overwritten for its gradient too, which may arrive infinite.
    """
    mask = _added(problem, extras, q, rows, columns)
    blind = None
    shown = problem.device.type != "cpu" or problem.return_lse
    if mask is not None and (shown or problem.needs_grad):
        if mask.dtype == torch.bool:
            blind = ~mask.any(-1, keepdim=True)  # (B|1, H|1, rows|1, 1)
            mask = mask | blind if shown else mask
        else:
            blind = mask.detach().amax(-1, keepdim=True) == float("-inf")
            mask = mask.masked_fill(blind, 0.0) if shown else mask
    out, lse = _sdpa(problem, q, k, v, attn_mask=mask)
    if blind is not None:
        out = out.masked_fill(blind.transpose(1, 2), 0.0)
        if lse is not None:
            lse = lse.masked_fill(blind.squeeze(-1), float("-inf"))
    return out, lse


def _added(
    problem: AttentionProblem, extras: Extras, q: torch.Tensor, rows: slice, columns: slice
) -> torch.Tensor | None:
    """ATen's mask: what is seen, or what is added to the scores with -inf where unseen."""
    seen = visible(problem, extras, q.device, rows, columns)
    total = None if extras.bias is None else cut(extras.bias, rows, columns)
    if extras.alibi_slopes is not None:
        distance = alibi(problem, extras.alibi_slopes, rows, columns)
        total = -distance if total is None else total - distance
    if total is None:
        return seen
    if seen is not None:
        total = torch.where(seen, total, float("-inf"))
    return total if q.device.type == "cpu" else total.to(q.dtype)  # CUDA's kernels want q's dtype


def _packed(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One sequence after another; between them zeros."""
    heads, precision = q.shape[1], modes.at_least_float32(q.dtype)
    starts_q, lengths_q = _starts_and_lengths(extras.cu_seqlens_q, extras.seqused_q)
    starts_k, lengths_k = _starts_and_lengths(extras.cu_seqlens_k, extras.seqused_k)
    parts: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    end = 0

    def pass_over(tokens: int) -> None:
        if tokens or not parts:  # something has to be there to be joined
            parts.append(q.new_zeros(tokens, heads, v.shape[2]))
            lses.append(q.new_full((heads, tokens), float("-inf"), dtype=precision))

    for b, (i, n, j, m) in enumerate(zip(starts_q, lengths_q, starts_k, lengths_k)):
        pass_over(i - end)
        end = i + n
        if n and m:
            one, its = _alone(problem, extras, b, slice(i, end), slice(j, j + m))
            part, part_lse = forward(
                one, q[None, i:end], k[None, j : j + m], v[None, j : j + m], its
            )
            parts.append(part[0])
            if part_lse is not None:
                lses.append(part_lse[0])
        else:
            pass_over(n)
    pass_over(q.shape[0] - end)
    result = torch.cat(parts)
    if problem.needs_grad and not result.requires_grad:  # no sequence has a key
        result = result + zeros_of(q, k, v, extras.bias, extras.alibi_slopes).to(q.dtype)
    return result, torch.cat(lses, 1) if problem.return_lse else None


def _starts_and_lengths(
    cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None
) -> tuple[list[int], list[int]]:
    assert cu_seqlens is not None
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    return starts[:-1], lengths if seqused is None else seqused.tolist()


def _alone(
    problem: AttentionProblem, extras: Extras, b: int, rows: slice, columns: slice
) -> tuple[AttentionProblem, Extras]:
    """The dense problem of sequence `b` of a packed one, and its tensors."""
    seqlen_q, seqlen_k = rows.stop - rows.start, columns.stop - columns.start

    def of_sequence(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[b : b + 1]
        return cut(x, slice(seqlen_q), slice(seqlen_k))

    mask = of_sequence(extras.mask)
    if extras.blocks is not None:
        sizes = (
            problem.settings.block_q,
            problem.settings.block_k,
            problem.seqlen_q,
            problem.seqlen_k,
        )
        whole = block_mask.dense(extras.blocks, *sizes)
        mask = of_sequence(whole if extras.mask is None else whole & extras.mask)
    slopes, documents = extras.alibi_slopes, extras.q_documents is not None
    its = Extras(
        mask=mask,
        bias=of_sequence(extras.bias),
        alibi_slopes=slopes if slopes is None or slopes.shape[0] == 1 else slopes[b : b + 1],
        q_documents=extras.q_documents[None, rows] if documents else None,  # type: ignore[index]
        k_documents=extras.k_documents[None, columns] if documents else None,  # type: ignore[index]
    )
    one = dataclasses.replace(
        problem,
        batch=1,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        given=tuple(name for name, x in zip(Extras._fields, its) if x is not None),
    )
    return one, its


def _sdpa(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    grouped = False
    if q.shape[1] != k.shape[1]:  # a branch, not a value: torch.compile specialises on it
        grouped = True
    scale = problem.settings.softmax_scale
    if scale < 0:  # ATen's kernel for the CPU scales its causal -inf too
        q, scale = -q, -scale
    if scale < SMALLEST:
        q, scale = q * scale, 1.0
    if not problem.return_lse:
        out = sdpa(q, k, v, attn_mask, problem.dropout_p, is_causal, scale, grouped)
        return out.transpose(1, 2), None
    if grouped:
        group_size = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, float("-inf"))
    dtype = q.dtype
    if dtype in HALVES and in_float32(q, k, v):
        q, k, v = q.float(), k.float(), v.float()
        attn_mask = attn_mask if attn_mask is None else attn_mask.float()
    # Called without the checks of F.scaled_dot_product_attention, the kernel assumes a stride of 1.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    return out.to(dtype).transpose(1, 2), lse
