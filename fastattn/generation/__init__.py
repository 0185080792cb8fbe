"""Generating from a model: decoding methods, sampling, the end of a text, CUDA graphs.

Nothing here knows a model's class, only what a model answers: see `fastattn.generation.contract`.
"""

from __future__ import annotations

from fastattn.generation.config import GenerationConfig
from fastattn.generation.interface import generate
from fastattn.generation.sampling import Sampling

__all__ = ["GenerationConfig", "Sampling", "generate"]
