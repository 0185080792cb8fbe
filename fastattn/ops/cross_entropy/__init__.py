"""The cross-entropy of a vocabulary."""

from __future__ import annotations

from fastattn.ops.cross_entropy.interface import IGNORED, cross_entropy

__all__ = ["IGNORED", "cross_entropy"]
