"""Generating from a model: decoding methods, sampling, the end of a text, CUDA graphs.

Nothing here knows a model's class, only what a model answers: `new_cache`, `features`, `lm_head`.
"""

from __future__ import annotations

from fastattn.generation.decoding import generate

__all__ = ["generate"]
