"""Layer normalisation and root-mean-square normalisation, with the residual addition fused."""

from __future__ import annotations

from fastattn.ops.layer_norm.interface import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
