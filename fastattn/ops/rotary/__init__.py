"""Rotary position embedding of q and k, with their RMSNorm fused."""

from __future__ import annotations

from fastattn.ops.rotary.interface import rotary

__all__ = ["rotary"]
