"""Perplexity of a text of any length, by a window that slides over it.

    tokens      . a b c d e f g h        "." begins the text and is not predicted
    window 1    . a b c                  predicts a b c d
    window 2        b c d e              predicts         e f        (context 4, stride 2)
    window 3            d e f g          predicts             g h

Every token is predicted once, after the first window from at least `context - stride + 1` tokens. A
smaller stride takes more time and gives more context: with stride 1 all that the model can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.generation.scoring import Row, score
from fastattn.nn.checks import check_integer
from fastattn.training.evaluation import metrics
from fastattn.training.sizes import longest_sequence
from fastattn.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by a text, or by several.

    Attributes:
        nats: the negative log-likelihood of all tokens.
        tokens: how many there are; all were predicted.
        bytes: of the texts in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return metrics.perplexity(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """A measure that no tokenizer changes."""
        return metrics.bits_per_byte(self.nats, self.bytes)


def perplexity(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], object] | None = None,
) -> Perplexity:
    """The perplexity of a text, or of several together, each read by itself.

    The first token is predicted from the tokenizer's "bos", else its end of text. The figure is the
    same at any `batch_size` to 1e-6 relative in float32: matrix products round by their shapes.

    Args:
        model: a decoder of this package, or a causal language model of transformers.
        texts: at least one, none of them empty.
        context: tokens that the model reads at once; by default all its positions.
        stride: tokens that a window after the first predicts, at most `context`; by default half
            of it.
        batch_size: windows a call.
        on_progress: called after each batch with the windows that it had.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    texts = [texts] if isinstance(texts, str) else texts
    encoded = tokenizer.encode_many(texts)
    if not encoded or not all(encoded):
        raise ValueError("texts must be at least one, and none empty: there is nothing to predict")
    context = context_of(model, context)
    stride = max(1, context // 2) if stride is None else check_integer("stride", stride, at_least=1)
    if stride > context:
        raise ValueError(f"stride must be at most the context, {context}, got {stride}")
    first = tokenizer.token("bos") if "bos" in tokenizer.roles else tokenizer.end_of_text
    rows = [row for ids in encoded for row in windows([first, *ids], context, stride)]
    scores = score(model, rows, batch_size=batch_size, on_progress=on_progress)
    nats = -math.fsum(value for found in scores for value in found.log_probabilities.tolist())
    size = sum(len(text.encode()) for text in texts)
    return Perplexity(nats, sum(map(len, encoded)), size)


def windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Row]:
    """Rows of at most `context` tokens to read that ask for every token of `ids` but the first."""
    done = 1
    while done < len(ids):
        end = min(done + (context if done == 1 else stride), len(ids))
        yield Row(ids[max(0, end - 1 - context) : done], ids[done:end])
        done = end


def bits_per_byte(
    model: torch.nn.Module, tokenizer: Tokenizer, text: str, context: int | None = None
) -> float:
    """How many bits `model` needs for a byte of `text`: `perplexity` with windows side by side."""
    context = context_of(model, context)
    return perplexity(model, tokenizer, text, context=context, stride=context).bits_per_byte


def context_of(model: Any, context: int | None) -> int:
    """The given one, else all positions of the model.

    Raises:
        TypeError, ValueError: it does not fit, or the model has no limit of its own.
    """
    most: int | None = getattr(model.config, "short_positions", None) or longest_sequence(model)
    if context is None:
        if most is None:
            raise ValueError(
                f"context must be given: {type(model).__name__} has no limit of its own that its "
                "config names"
            )
        return most
    check_integer("context", context, at_least=1)
    if most is not None and context > most:
        raise ValueError(f"context must be at most the model's {most} positions, got {context}")
    return context
