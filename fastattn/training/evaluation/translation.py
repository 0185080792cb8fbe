"""Translations by a model, for BLEU and chrF, and for whoever wants to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fastattn.nn.checks import check_integer
from fastattn.training.tokenizer import Tokenizer


def translations(
    model: Any,
    tokenizer: Tokenizer,
    sources: Sequence[Sequence[int]],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    on_progress: Callable[[int], object] | None = None,
) -> list[str]:
    """The text that an encoder-decoder writes for each source, without special tokens.

    A source gets the tokens that it would get alone, as `fastattn.generation.generate` promises.

    Args:
        model: a `fastattn.models.EncoderDecoder`, or one of transformers.
        sources: token ids, of any lengths, as the objective "sequence_to_sequence" encodes them.
        num_beams: 1 is greedy.
        max_new_tokens: of a translation at most.
        batch_size: sources a call.
        on_progress: called after each batch with the sources that it had.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_integer("batch_size", batch_size, at_least=1)
    device = next(model.parameters()).device
    padding = tokenizer.token("pad") if "pad" in tokenizer.roles else tokenizer.end_of_text
    texts = [""] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))  # little padding in a batch
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [torch.tensor(sources[i], device=device) for i in chosen]
        out = model.generate(
            pad_sequence(rows, batch_first=True, padding_value=padding),
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
        )
        for i, ids in zip(chosen, out.tolist(), strict=True):
            texts[i] = tokenizer.decode([t for t in ids if t not in tokenizer.special_ids]).strip()
        if on_progress is not None:
            on_progress(len(chosen))
    return texts
