"""Training: text, tokenizer, batches, the loop and its record."""

from __future__ import annotations

from fastattn.training.data import TokenSplit, load_corpus, sample_batch, split_text, tokenize
from fastattn.training.evaluation.perplexity import bits_per_byte
from fastattn.training.history import Evaluation, History, Step
from fastattn.training.loop import TrainingConfig, evaluate, train
from fastattn.training.tokenizer import Tokenizer

__all__ = [
    "Evaluation",
    "History",
    "Step",
    "TokenSplit",
    "Tokenizer",
    "TrainingConfig",
    "bits_per_byte",
    "evaluate",
    "load_corpus",
    "sample_batch",
    "split_text",
    "tokenize",
    "train",
]
