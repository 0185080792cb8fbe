"""Generating from a model: decoding methods, sampling, the end of a text, batching, CUDA graphs.

Nothing here knows a model's class, only what a model answers: see `fastattn.generation.contract`.
"""

from __future__ import annotations

from fastattn.generation.background import Background
from fastattn.generation.config import GenerationConfig
from fastattn.generation.engine import Engine
from fastattn.generation.interface import generate
from fastattn.generation.request import Request
from fastattn.generation.sampling import Sampling

__all__ = ["Background", "Engine", "GenerationConfig", "Request", "Sampling", "generate"]
