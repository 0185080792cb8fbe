"""A head and its cross-entropy in one, without the logits."""

from __future__ import annotations

from fastattn.ops.linear_cross_entropy.interface import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
