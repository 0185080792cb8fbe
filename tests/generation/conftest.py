"""The pairs of GPT-2s that the models' tests have."""

from __future__ import annotations

from models.conftest import make_pair, pair, small

__all__ = ["make_pair", "pair", "small"]
