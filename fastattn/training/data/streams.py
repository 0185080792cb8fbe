"""A stream of tokens as batches: random windows of it, and for an evaluation windows side by side.

Letters of the shapes: B sequences a batch, T tokens a sequence (the context), N tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy
import torch

from fastattn.nn.checks import check_integer, check_seed
from fastattn.training.contract import Batch
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


class Windows:
    """Batches of windows of one stream, for a causal model of ours: the tokens, and the next ones.

        windows = Windows(split.training, batch_size=8, context=128, seed=0)
        train(model, Causal(tokenizer), windows, config)

    Batch k holds windows at random places, which follow from the seed and k. A window may cross the
    end of a text, which the model sees as the end-of-text token.

    Args:
        tokens: (N,) int64 on the CPU, at least context + 1.
        batch_size: windows a batch.
        context: tokens a window.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(self, tokens: torch.Tensor, batch_size: int, context: int, seed: int = 0) -> None:
        self.batch_size = check_integer("batch_size", batch_size, at_least=1)
        self.context = check_integer("context", context, at_least=1)
        check_seed("seed", check_integer("seed", seed))
        if tokens.dim() != 1 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be a stream of tokens, (N,) int64; got {tuple(tokens.shape)} "
                f"{tokens.dtype}"
            )
        if len(tokens) < context + 1:
            raise ValueError(
                f"tokens has {len(tokens)} tokens; a context of {context} needs at least "
                f"{context + 1}: give more text or a shorter context"
            )
        self.tokens = tokens
        self.seed = seed % 2**64

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted from 0."""
        random = numpy.random.default_rng((self.seed, index))
        starts = random.integers(len(self.tokens) - self.context, size=(self.batch_size, 1))
        places = torch.from_numpy(starts + numpy.arange(self.context + 1))
        return _batch(self.tokens[places])

    def once(self, first: int = 0, step: int = 1) -> Iterable[Batch]:
        """The stream as windows side by side: every token but the first is a target once.

        The rest at the end that fills no window is left out; the last batch may be smaller.
        """
        windows = self.tokens.unfold(0, self.context + 1, self.context)  # they overlap by one token
        return map(_batch, windows.split(self.batch_size)[first::step])


def _batch(windows: torch.Tensor) -> Batch:
    """Of windows (B, T + 1)."""
    arguments = {"input_ids": windows[:, :-1], "targets": windows[:, 1:]}
    count = arguments["targets"].numel()
    return Batch(arguments, counted=count, tokens=count)
