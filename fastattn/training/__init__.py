"""Training: text, tokenizer, objectives, batches, the loop, its checkpoints and its record."""

from __future__ import annotations

from fastattn.training.checkpoints import Checkpoints
from fastattn.training.data import TokenSplit, Windows, load_corpus, split_text, tokenize
from fastattn.training.evaluation.perplexity import bits_per_byte
from fastattn.training.history import Evaluation, History, JsonLines, Step, TensorBoard
from fastattn.training.loop import evaluate, train
from fastattn.training.objectives import Causal
from fastattn.training.steps.config import TrainingConfig
from fastattn.training.tokenizer import Tokenizer

__all__ = [
    "Causal",
    "Checkpoints",
    "Evaluation",
    "History",
    "JsonLines",
    "Step",
    "TensorBoard",
    "TokenSplit",
    "Tokenizer",
    "TrainingConfig",
    "Windows",
    "bits_per_byte",
    "evaluate",
    "load_corpus",
    "split_text",
    "tokenize",
    "train",
]
