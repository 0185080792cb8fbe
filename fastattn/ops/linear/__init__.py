"""A linear layer with an activation, and the bare product that is fast for a few rows too."""

from __future__ import annotations

from fastattn.ops.linear.few_rows import product
from fastattn.ops.linear.interface import linear

__all__ = ["linear", "product"]
