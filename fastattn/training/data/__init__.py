"""Text to batches."""

from __future__ import annotations

from fastattn.training.data.corpus import load_corpus, split_text
from fastattn.training.data.streams import TokenSplit, consecutive_batches, sample_batch, tokenize

__all__ = [
    "TokenSplit",
    "consecutive_batches",
    "load_corpus",
    "sample_batch",
    "split_text",
    "tokenize",
]
