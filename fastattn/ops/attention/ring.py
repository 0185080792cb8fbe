"""Attention on a sequence of which each process of a group holds a part.

Keys and values travel around the ring of processes, as many steps as there are processes (Liu et
al. 2023, arXiv:2310.01889); each process attends from its queries to whatever part is there, and
merges the results by their LSE. In the backward, which needs only the final out and LSE, the
gradients of keys and values travel with them and come home after a whole turn. Memory is linear in
the part's length, and the next part is on its way while one is computed with.

Parts are balanced as `zigzag` has it, which does the same as striped attention (Brandon et al.
2023, arXiv:2311.09431) with runs of tokens that kernels need no mask for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist

from fastattn.ops.attention import problem as _problem
from fastattn.ops.attention import zigzag
from fastattn.ops.attention.gradients import gradients
from fastattn.ops.attention.interface import attention
from fastattn.ops.attention.merging import merge_attention_states
from fastattn.ops.common import modes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: ProcessGroup,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: ProcessGroup,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: ProcessGroup,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` of a sequence whose parts lie on the processes of `group`; self-attention.

    Every process of the group calls it with its part, in the same shapes and dtype. Process r of R
    holds the positions `zigzag.places(r, R, length)` of the whole sequence, whose length is R times
    the part's. Its result, and the gradients, are those rows of what one process would have. Each
    call, and its backward, is a collective operation: the processes make them in one order.

    Packed sequences stay one row, cut like any other, and `cu_seqlens` hides them from each other:
    so no sequence needs a length that R divides, and short ones lie on few processes.

    Args:
        q: (batch, part, heads, head_dim), `part` even; as `attention`'s, like k and v.
        k: (batch, part, kv_heads, head_dim).
        v: (batch, part, kv_heads, head_dim_v).
        group: the processes, in the order of their ranks in it.
        causal, window, softmax_scale, softcap: as `attention`'s, by the positions in the whole
            sequence. There is no dropout, bias or sink.
        cu_seqlens: (sequences + 1,), int32 or int64: where the sequences begin that the whole row
            is packed of, and where the last one ends, which is the row's length. Then batch is 1.
            Every process has the same; the contents are checked only on a CPU.
        return_lse: return the log-sum-exp of the scores too. Its gradient counts.
        backend: of each process's attention, as `attention`'s.

    Returns:
        out, (batch, part, heads, head_dim_v) in q's dtype; with `return_lse` the pair (out, lse),
        lse (batch, heads, part), natural logarithm, float32 (float64 for float64). There is a first
        derivative only.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    if isinstance(q, torch.Tensor) and (dtype := modes.autocast_dtype(q.device.type)) is not None:
        q, k, v = modes.cast(q, dtype), modes.cast(k, dtype), modes.cast(v, dtype)
    settings, _ = _problem.check(
        q, k, v, causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap
    )
    ring = _ring_of(group)
    _check_parts(q, k, causal, cu_seqlens, ring.size)
    call = _Call(
        ring,
        causal=bool(causal),
        window=(settings.window_left, settings.window_right),
        options={"softmax_scale": softmax_scale, "softcap": softcap, "backend": backend},
    )
    out, lse = _RingAttention.apply(q, k, v, cu_seqlens, call)
    return (out, lse) if return_lse else out


def _check_parts(
    q: torch.Tensor, k: torch.Tensor, causal: Any, cu_seqlens: torch.Tensor | None, size: int
) -> None:
    """Raise for whatever is an error of a part, and would be none of `attention`'s arguments."""
    batch, part = q.shape[:2]
    if k.shape[1] != part or part % 2 or not part:
        raise ValueError(
            "q, k and v must be this process's part of one sequence, of one even length; got "
            f"{part} queries and {k.shape[1]} keys: cut a sequence, padded to a multiple of 2 * "
            f"{size} tokens, as zigzag.places has it"
        )
    if isinstance(causal, str):
        raise ValueError(f"causal must be True or False: a sequence is square; got {causal!r}")
    if cu_seqlens is None:
        return
    _problem.check_index("cu_seqlens", cu_seqlens, ("sequences + 1", None), q.device)
    if batch != 1:
        raise ValueError(f"packed sequences lie in one row, so that batch must be 1; got {batch}")
    if not _problem.values_are_checked(cu_seqlens):
        return
    starts, length = cu_seqlens.tolist(), part * size
    if not starts or starts[0] != 0 or starts[-1] != length or starts != sorted(starts):
        raise ValueError(
            f"cu_seqlens must go from 0 to the {length} tokens of the whole row, not decreasing; "
            f"got {starts if len(starts) <= 8 else [*starts[:4], '...', *starts[-2:]]}"
        )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The processes of a group in a circle: parts travel from each to the next."""

    group: ProcessGroup
    rank: int
    size: int

    def turn(self, buffer: torch.Tensor) -> _Transfer:
        """Begin to send `buffer` to the next process, and to receive the former one's."""
        received = torch.empty_like(buffer)
        after, before = (
            dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1)
        )
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, buffer, after, self.group),
                dist.P2POp(dist.irecv, received, before, self.group),
            ]
        )
        return _Transfer(buffer, received, works)

    def parts(self, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[int, Any, Any]]:
        """(process, its k, its v) of all parts, beginning with the own one.

        The next part is on its way while the caller computes with one.
        """
        if self.size == 1:
            yield self.rank, k, v
            return
        here = _joined(k, v)
        for step in range(self.size):
            transfer = self.turn(here) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, *_split(here, k, v)
            if transfer is not None:
                here = transfer.wait()


@dataclasses.dataclass
class _Transfer:
    """One that is under way; `sent` must live until it is done."""

    sent: torch.Tensor
    received: torch.Tensor
    works: list[Any]

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _ring_of(group: Any) -> _Ring:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "ring_attention needs processes that know each other: call "
            "torch.distributed.init_process_group first"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup that this process belongs to, as "
            f"new_group and mesh.get_group give it; got {type(group).__name__}"
        )
    return _Ring(group, dist.get_rank(group), dist.get_world_size(group))


def _joined(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Both in one message."""
    return torch.cat([k.flatten(), v.flatten()])


def _split(buffer: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, Any]:
    """The tensors of the shapes of k and v in it."""
    first, second = buffer.split([k.numel(), v.numel()])
    return first.view(k.shape), second.view(v.shape)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of `ring_attention` apart from its tensors."""

    ring: _Ring
    causal: bool
    window: tuple[int, int]
    options: dict[str, Any]  # the other arguments of every block's attention

    def blocks(
        self, source: int, part: int, cu_seqlens: torch.Tensor | None
    ) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
        """(rows, columns, arguments of attention) of what the own queries see of a part."""
        rank, size = self.ring.rank, self.ring.size
        documents = None
        if cu_seqlens is not None:
            documents = [
                torch.bucketize(
                    zigzag.places(process, size, part * size, cu_seqlens.device),
                    cu_seqlens[1:],
                    right=True,
                ).unsqueeze(0)
                for process in (rank, source)
            ]
        for block in zigzag.blocks(rank, source, size, part // 2, self.causal, self.window):
            arguments = {"causal": block.causal, "window": block.window, **self.options}
            if documents is not None:
                queries, keys = documents
                arguments["document_ids"] = queries[:, block.rows], keys[:, block.columns]
            yield block.rows, block.columns, arguments


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        call: _Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        precision = modes.at_least_float32(q.dtype)
        batch, part, heads = q.shape[:3]
        out = q.new_zeros((batch, part, heads, v.shape[3]), dtype=precision)
        lse = q.new_full((batch, heads, part), float("-inf"), dtype=precision)
        for source, its_k, its_v in call.ring.parts(k, v):
            for rows, columns, arguments in call.blocks(source, part, cu_seqlens):
                more = attention(
                    q[:, rows], its_k[:, columns], its_v[:, columns], return_lse=True, **arguments
                )
                out[:, rows], lse[..., rows] = merge_attention_states(
                    [out[:, rows], more[0].to(precision)], [lse[..., rows], more[1].to(precision)]
                )
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        call: _Call = ctx.call
        ring, precision = call.ring, lse.dtype
        dout = torch.zeros_like(out) if dout is None else dout
        dq = torch.zeros_like(q, dtype=precision)
        arriving: _Transfer | None = None
        # The formulas keep float32 where a backward is called under autocast.
        with torch.autocast(q.device.type, enabled=False):
            for source, its_k, its_v in ring.parts(k, v):
                dk, dv = (torch.zeros_like(x, dtype=precision) for x in (its_k, its_v))
                for rows, columns, arguments in call.blocks(source, q.shape[1], cu_seqlens):
                    more = gradients(
                        dout[:, rows], None if dlse is None else dlse[..., rows], out[:, rows],
                        lse[..., rows], q[:, rows], its_k[:, columns], its_v[:, columns],
                        **arguments,
                    )  # fmt: skip
                    dq[:, rows] += more[0]
                    dk[:, columns] += more[1]
                    dv[:, columns] += more[2]
                if ring.size > 1:
                    sums = _joined(dk, dv)
                    if arriving is not None:  # from the processes that have had this part
                        sums += arriving.wait()
                    arriving = ring.turn(sums)
            if arriving is not None:  # home, after a whole turn
                dk, dv = _split(arriving.wait(), k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None
