"""A linear layer, fast also where a few rows go through it on a CPU."""

from __future__ import annotations

from fastattn.ops.linear.interface import linear

__all__ = ["linear"]
