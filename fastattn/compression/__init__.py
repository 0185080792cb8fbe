"""Smaller models: weights of fewer bits, fewer heads, fewer features (docs/compression.md)."""

from fastattn.compression.pruning import prune_features, prune_heads, prune_weights, smaller
from fastattn.compression.quantisation import MODES, Report, quantize

__all__ = [
    "MODES",
    "Report",
    "prune_features",
    "prune_heads",
    "prune_weights",
    "quantize",
    "smaller",
]
