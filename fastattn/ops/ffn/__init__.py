"""The feed-forward part of a transformer: two linear maps with an activation between."""

from __future__ import annotations

from fastattn.ops.ffn.interface import ffn

__all__ = ["ffn"]
