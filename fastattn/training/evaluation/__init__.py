"""How good a model is: perplexity, and scores of answers."""

from __future__ import annotations

from fastattn.training.evaluation.perplexity import Perplexity, bits_per_byte, perplexity

__all__ = ["Perplexity", "bits_per_byte", "perplexity"]
