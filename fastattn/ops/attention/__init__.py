"""Fused softmax attention."""

from __future__ import annotations

from fastattn.ops.attention.block_mask import BlockMask
from fastattn.ops.attention.cache import attention_with_kv_cache
from fastattn.ops.attention.interface import attention, attention_varlen
from fastattn.ops.attention.merging import merge_attention_states
from fastattn.ops.attention.ring import ring_attention

__all__ = [
    "BlockMask",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "merge_attention_states",
    "ring_attention",
]
