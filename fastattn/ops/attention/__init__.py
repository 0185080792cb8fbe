"""Fused softmax attention."""

from __future__ import annotations

from fastattn.ops.attention.interface import attention

__all__ = ["attention"]
