"""Records to examples to batches; the texts that ship."""

from __future__ import annotations

from fastattn.training.data.corpus import load_corpus, split_text
from fastattn.training.data.order import Packed, Shuffled
from fastattn.training.data.preparation import prepare
from fastattn.training.data.sources import find_files, read_records
from fastattn.training.data.storage import Examples
from fastattn.training.data.streams import TokenSplit, Windows, tokenize

__all__ = [
    "Examples",
    "Packed",
    "Shuffled",
    "TokenSplit",
    "Windows",
    "find_files",
    "load_corpus",
    "prepare",
    "read_records",
    "split_text",
    "tokenize",
]
