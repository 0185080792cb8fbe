"""A call on a key-value cache in the form in which it travels to the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The members of attention's Extras and Settings that a cache's call sets; others have defaults.
EXTRAS = ("alibi_slopes", "sink")
SETTINGS = ("window_left", "window_right", "softmax_scale", "softcap")


class CacheCall(NamedTuple):
    """Where the keys of a call are, and what happens to q and the new keys on the way."""

    k: torch.Tensor  # (cache_batch, capacity, kv_heads, head_dim); paged: (pages, page_size, ...)
    v: torch.Tensor
    lengths: torch.Tensor  # (batch,) before the call
    new_k: torch.Tensor | None
    new_v: torch.Tensor | None
    block_table: torch.Tensor | None
    indices: torch.Tensor | None
    starts: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    k_scale: torch.Tensor | None  # of a cache of 8-bit numbers, (kv_heads,) or (batch, kv_heads)
    v_scale: torch.Tensor | None
    rotary_interleaved: bool
    rotary_advances: bool  # query i stands i after the first one, else all where the first stands
    num_splits: int | None

    @property
    def capacity(self) -> int:
        """Keys that a sequence can have: none if there is no page, or no row."""
        if not self.k.shape[0]:
            return 0
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]

    @property
    def seqlen_new(self) -> int:
        return 0 if self.new_k is None else self.new_k.shape[1]
