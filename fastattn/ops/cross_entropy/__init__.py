"""The cross-entropy of a vocabulary."""

from __future__ import annotations

from fastattn.ops.cross_entropy.interface import cross_entropy
from fastattn.ops.cross_entropy.problem import IGNORED

__all__ = ["IGNORED", "cross_entropy"]
