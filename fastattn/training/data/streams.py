"""A stream of tokens to batches: random windows of it, or windows side by side.

Letters of the shapes: B sequences a batch, T tokens a sequence (the context), N tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fastattn.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenSplit:
    """Token streams: `training` (N,) and `validation` (N',), int64 on the CPU."""

    training: torch.Tensor
    validation: torch.Tensor


def tokenize(tokenizer: Tokenizer, parts: Mapping[str, tuple[str, str]]) -> TokenSplit:
    """Encode the (training, validation) pairs, each text followed by the end-of-text token.

    Raises:
        ValueError: `parts` is empty.
    """
    if not parts:
        raise ValueError("parts is empty: there is no text to tokenize")

    def stream(which: int) -> torch.Tensor:
        ids: list[int] = []
        for pair in parts.values():
            ids += [*tokenizer.encode(pair[which]), tokenizer.end_of_text]
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    return TokenSplit(stream(0), stream(1))


def check_stream(tokens: torch.Tensor, context: int, name: str) -> None:
    """Raise ValueError unless `tokens` is a stream with at least one window of context + 1."""
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(
            f"{name} must be a stream of tokens, (N,) int64; got {tuple(tokens.shape)} "
            f"{tokens.dtype}"
        )
    if len(tokens) < context + 1:
        raise ValueError(
            f"{name} has {len(tokens)} tokens; a context of {context} needs at least "
            f"{context + 1}: give more text or a shorter context"
        )


def sample_batch(
    tokens: torch.Tensor, batch_size: int, context: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of the stream: inputs (B, T) and targets (B, T), the inputs' next tokens.

    Args:
        tokens: (N,) int64 on any device; the batch is on the same.
        generator: a CPU generator; the windows depend on it, not on the device.

    Raises:
        ValueError: the stream is shorter than context + 1.
    """
    check_stream(tokens, context, "tokens")
    where = generator.device
    choices = len(tokens) - context
    starts = torch.randint(choices, (batch_size, 1), generator=generator, device=where)
    places = starts + torch.arange(context + 1, device=where)
    windows = tokens[places.to(tokens.device)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def consecutive_batches(
    tokens: torch.Tensor, batch_size: int, context: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The stream as windows side by side, in order: every token but the first is a target once.

    The rest at the end that fills no window of `context` is left out; the last batch may be
    smaller.

    Raises:
        ValueError: the stream is shorter than context + 1.
    """
    check_stream(tokens, context, "tokens")
    windows = tokens.unfold(0, context + 1, context)  # (windows, T + 1), overlapping by one token
    for batch in windows.split(batch_size):
        yield batch[:, :-1], batch[:, 1:]
