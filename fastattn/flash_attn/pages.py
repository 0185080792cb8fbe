"""Keys and values in pages, as flash-attn's varlen function takes them, for `attention_varlen`."""

from __future__ import annotations

import torch

from fastattn.ops.attention.problem import check_block_table, check_index, values_are_checked


def gathered(
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Pages copied into packed sequences of one length.

    Args:
        k: (pages, page_size, kv_heads, head_dim); v likewise.
        block_table: (batch, max_pages), the pages of each sequence. Entries after a sequence's last
            page may be anything.
        cu_seqlens_k: (batch + 1,): the differences are the sequences' lengths.
        max_seqlen_k: the longest of them.

    Returns:
        k, v: (batch * room, kv_heads, head_dim), room = max_seqlen_k rounded up to whole pages.
        cu_seqlens_k: (batch + 1,), the multiples of room.
        max_seqlen_k: room.
        seqused_k: (batch,), the sequences' lengths.

    Raises:
        ValueError: a shape does not fit; or, where contents are checked (on a CPU; on a GPU with
            FASTATTN_CHECK=1), block_table names a page that is not there or has too few. Unchecked,
            the nearest page is read instead.
        TypeError: block_table or cu_seqlens_k holds no integers.
    """
    if k.dim() != 4 or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            "k and v must be (pages, page_size, kv_heads, head_dim) where block_table is given; "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    check_index("cu_seqlens_k", cu_seqlens_k, ("batch + 1", None), k.device)
    pages, page_size = k.shape[:2]
    seqused_k = cu_seqlens_k.diff()
    batch = seqused_k.shape[0]
    check_block_table(block_table, batch, k.device)
    table = block_table[:, : -(-max_seqlen_k // page_size) if pages and page_size else 0]
    columns = table.shape[1]
    room = columns * page_size
    first = torch.arange(columns, device=table.device) * page_size
    table = table.masked_fill(first >= seqused_k[:, None], 0)
    if values_are_checked(table) and batch:
        if (longest := int(seqused_k.max())) > room:
            raise ValueError(
                f"block_table and max_seqlen_k leave {columns} pages of {page_size} keys to a "
                f"sequence; cu_seqlens_k has one of {longest}"
            )
        if strangers := table[(table < 0) | (table >= pages)].tolist():
            raise ValueError(
                f"block_table must name pages of k, 0 to {pages - 1}; got {strangers[0]}"
            )
    table = table.clamp(0, max(pages - 1, 0))
    k, v = (x[table].flatten(0, 2) for x in (k, v))
    starts = torch.arange(batch + 1, device=table.device) * room
    return k, v, starts, room, seqused_k
