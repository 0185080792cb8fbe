"""Attention on a key-value cache."""

from __future__ import annotations

from fastattn.ops.attention.cache.interface import attention_with_kv_cache

__all__ = ["attention_with_kv_cache"]
