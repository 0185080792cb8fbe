"""What a sequence's own tokens do to the logits of its next: penalties, bans, forced tokens.

Shapes: B sequences, n tokens of each, V vocabulary. Sequences of unequal lengths are padded on the
left with V, an id that no token has: so each keeps its own history, whatever shares the batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastattn.generation.sampling import Processor, Sampling, penalise


def padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """Lists of token ids as (B, n), with ``pad`` before them; of `process` that is V."""
    longest = max(map(len, sequences))
    rows = [[pad] * (longest - len(row)) + list(row) for row in sequences]
    return torch.tensor(rows, device=device)


def process(
    logits: Tensor,
    ids: Tensor,
    new: Tensor,
    last: Tensor,
    sampling: Sampling,
    ends: Sequence[int] = (),
) -> Tensor:
    """The logits (B, V) after all of ``sampling`` that asks for the tokens before.

    The order is that of transformers; frequency and presence follow the repetition penalty, as in
    vLLM.

    Args:
        logits: (B, V) of the next token.
        ids: (B, n) int64, the tokens before, padded on the left with V.
        new: (B,) int64, how many of a sequence's last tokens are new, the rest being its prompt.
        last: (B,) boolean, whether no token follows the next one.
        ends: the tokens that end a sequence.

    Returns:
        (B, V) float32.

    Raises:
        ValueError: a logits_processor returned something else than logits of that shape.
    """
    logits = logits.float()
    vocab_size = logits.shape[-1]
    lengths = (ids != vocab_size).sum(-1)  # (B,)
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, count(ids, vocab_size) > 0, sampling.repetition_penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        from_end = torch.arange(ids.shape[1], 0, -1, device=ids.device)
        times = count(ids.masked_fill(from_end > new.unsqueeze(-1), vocab_size), vocab_size)
        logits = logits - sampling.frequency_penalty * times
        logits = logits - sampling.presence_penalty * (times > 0)
    if sampling.no_repeat_ngram_size:
        logits = _without_repeated_ngrams(logits, ids, sampling.no_repeat_ngram_size)
    for prefixes, tokens in _bad_words(sampling.bad_words_ids, tuple(ends), logits.device):
        logits = _without_words(logits, ids, prefixes, tokens)
    if ends and (sampling.min_new_tokens or sampling.min_length):
        short = (new < sampling.min_new_tokens) | (lengths < sampling.min_length)
        logits = _where(short, _without(logits, ends), logits)
    if (first := sampling.forced_bos_token_id) is not None:
        logits = _where(lengths == 1, _only(logits, (first,)), logits)
    if (final := sampling.forced_eos_token_id) is not None:
        logits = _where(last, _only(logits, cast(Sequence[int], final)), logits)
    if sampling.suppress_tokens:
        logits = _without(logits, sampling.suppress_tokens)
    if sampling.begin_suppress_tokens:
        begins = new == 0
        if sampling.forced_bos_token_id is not None:  # the beginning is after a forced token
            begins = torch.where(lengths == new + 1, new == 1, begins)
        logits = _where(begins, _without(logits, sampling.begin_suppress_tokens), logits)
    if sampling.logits_processor:
        functions = cast(Sequence[Processor], sampling.logits_processor)
        logits = _by_callers(logits, ids, lengths.tolist(), functions)
    return logits


def count(ids: Tensor, vocab_size: int) -> Tensor:
    """How often each token is in a sequence: (B, n) -> (B, V) float32."""
    counts = torch.zeros(len(ids), vocab_size + 1, dtype=torch.float32, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))[:, :vocab_size]


def _where(rows: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """(B, V) of ``chosen`` where ``rows`` (B,), else of ``other``."""
    return torch.where(rows.unsqueeze(-1), chosen, other)


def _without(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    return logits.index_fill(-1, torch.tensor(tokens, device=logits.device), -math.inf)


def _only(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits of which only ``tokens`` can be chosen, all as probable."""
    index = torch.tensor(tokens, device=logits.device)
    return torch.full_like(logits, -math.inf).index_fill(-1, index, 0.0)


def _without_repeated_ngrams(logits: Tensor, ids: Tensor, size: int) -> Tensor:
    if ids.shape[1] < size:
        return logits
    vocab_size = logits.shape[-1]
    windows = ids.unfold(1, size, 1)  # (B, n - size + 1, size)
    begun = ids[:, ids.shape[1] + 1 - size :].unsqueeze(1)  # what the next token would complete
    repeated = (windows[..., :-1] == begun).all(-1)
    tokens = torch.where(repeated, windows[..., -1], vocab_size)
    banned = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    return logits.masked_fill(banned.scatter_(1, tokens, True)[:, :vocab_size], -math.inf)


@functools.lru_cache(maxsize=16)
def _bad_words(
    words: tuple[tuple[int, ...], ...], ends: tuple[int, ...], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Words of each length as (prefixes (W, length - 1), last tokens (W,)).

    A word that is just the end of a sequence does not count, as in transformers.
    """
    counted = sorted((w for w in words if not (len(w) == 1 and w[0] in ends)), key=len)
    with torch.inference_mode(False):  # kept for callers in other modes
        return [
            (
                torch.tensor([word[:-1] for word in group], dtype=torch.int64, device=device),
                torch.tensor([word[-1] for word in group], device=device),
            )
            for group in (list(same) for _, same in itertools.groupby(counted, key=len))
        ]


def _without_words(logits: Tensor, ids: Tensor, prefixes: Tensor, tokens: Tensor) -> Tensor:
    length = prefixes.shape[1]
    if length > ids.shape[1]:
        return logits
    begun = (ids[:, None, ids.shape[1] - length :] == prefixes).all(-1)  # (B, W)
    banned = torch.zeros_like(logits).index_add_(1, tokens, begun.to(logits.dtype)) > 0
    return logits.masked_fill(banned, -math.inf)


def _by_callers(
    logits: Tensor, ids: Tensor, lengths: list[int], functions: Sequence[Processor]
) -> Tensor:
    """The caller's processors, on sequences of one length at a time."""
    out = logits.clone()
    for length in sorted(set(lengths)):
        rows = [row for row, each in enumerate(lengths) if each == length]
        part = logits[rows]
        for function in functions:
            given, part = part.shape, function(ids[rows, ids.shape[1] - length :], part)
            if not isinstance(part, Tensor) or part.shape != given:
                raise ValueError(
                    f"logits_processor must return logits of the shape {tuple(given)}, got "
                    f"{tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}"
                )
        out[rows] = part.to(out.dtype)
    return out
