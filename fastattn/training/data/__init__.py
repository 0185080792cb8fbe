"""Text to batches."""

from __future__ import annotations

from fastattn.training.data.corpus import load_corpus, split_text
from fastattn.training.data.streams import TokenSplit, Windows, tokenize

__all__ = [
    "TokenSplit",
    "Windows",
    "load_corpus",
    "split_text",
    "tokenize",
]
