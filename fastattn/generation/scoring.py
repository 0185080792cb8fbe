"""Scoring: how probable a model finds given tokens after others, many rows in a call.

Shapes: B rows of one call, T tokens of the longest, C width, N scored tokens of all rows, V
vocabulary. Rows are padded on the right, where no causal query sees the padding.

    context  a b c        the model reads     a b c d e
    tokens   d e f        and is asked for        d e f
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.generation.contract import batch_context, is_encoder_decoder
from fastattn.generation.prompts import right_padded
from fastattn.nn.checks import check_integer
from fastattn.nn.mode import in_mode

HEAD_ROWS = 512  # tokens whose logits exist at once


class Row(NamedTuple):
    """Tokens to score, and those before them.

    Attributes:
        context: at least one token id.
        tokens: at least one token id; the last of them is not read.
    """

    context: Sequence[int]
    tokens: Sequence[int]


class Scores(NamedTuple):
    """What a model says of a row's n tokens.

    Attributes:
        log_probabilities: (n,) float64 on the CPU, the natural logarithms.
        greedy: (n,) boolean on the CPU: the token is the most probable one.
    """

    log_probabilities: Tensor
    greedy: Tensor


def score(
    model: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    on_progress: Callable[[int], object] | None = None,
) -> list[Scores]:
    """The log-probability of each token of each row after all tokens before it.

    A row's scores are those that it would have alone, but for the rounding of matrix products,
    which depends on their shapes: 1e-6 relative in float32. Dropout is off meanwhile.

    A decoder of this package reads a context that several rows of a batch share once, and makes
    logits only of scored tokens.

    Args:
        model: a decoder of this package, or a causal language model of transformers.
        rows: of any lengths, each within the model's positions.
        batch_size: rows a call.
        on_progress: called after each batch with the rows that it had.

    Raises:
        TypeError: `model` is no causal language model.
        ValueError: a row has no context, no token or too many, or `batch_size` is below 1.
    """
    check_integer("batch_size", batch_size, at_least=1)
    ours = hasattr(model, "features") and hasattr(model, "lm_head")
    if is_encoder_decoder(model) or not (ours or _generates(model)):
        raise TypeError(
            "model must be a causal language model, of this package or of transformers, got "
            f"{type(model).__name__}"
        )
    for i, row in enumerate(rows):
        if not len(row.context) or not len(row.tokens):
            raise ValueError(
                f"rows must each have a context and tokens to score; row {i} has "
                f"{len(row.context)} and {len(row.tokens)}: let a text begin with a special token"
            )
    if ours:
        _check_fit(rows, *batch_context(model.config))
    scores: list[Scores | None] = [None] * len(rows)
    with torch.inference_mode(), in_mode(model, training=False):
        for batch in _batches(rows, batch_size):
            found = _score_ours if ours else _score_transformers
            asked = [row for _, row in batch]
            for (i, _), result in zip(batch, found(model, asked), strict=True):
                scores[i] = result
            if on_progress is not None:
                on_progress(len(batch))
    return [result for result in scores if result is not None]


def _generates(model: Any) -> bool:
    """Whether transformers calls it a model that continues texts: a masked one has logits too."""
    asked = getattr(model, "can_generate", None)
    return asked is not None and bool(asked())


def _check_fit(rows: Sequence[Row], limit: str, positions: int | None) -> None:
    for i, row in enumerate(rows):
        count = len(row.context) + len(row.tokens) - 1
        if positions is not None and count > positions:
            raise ValueError(
                f"rows must fit into the model's {limit} = {positions}; row {i} has {count} "
                "tokens to read: cut its context from the left"
            )


def _batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[tuple[int, Row]]]:
    """The longest first; rows of one context side by side."""
    longest: dict[tuple[int, ...], int] = {}
    contexts = [tuple(row.context) for row in rows]
    for context, row in zip(contexts, rows, strict=True):
        longest[context] = max(longest.get(context, 0), len(context) + len(row.tokens))
    order = sorted(
        range(len(rows)),
        key=lambda i: (-longest[contexts[i]], contexts[i], -len(rows[i].tokens)),
    )
    for first in range(0, len(order), batch_size):
        yield [(i, rows[i]) for i in order[first : first + batch_size]]


def _score_ours(model: Any, rows: Sequence[Row]) -> list[Scores]:
    hidden, ends = _hidden(model, rows)
    return _scores(rows, _picked(hidden, rows, ends), model.lm_head)


def _score_transformers(model: Any, rows: Sequence[Row]) -> list[Scores]:
    whole = [[*row.context, *row.tokens[:-1]] for row in rows]
    logits = model(input_ids=right_padded(whole, _device(model)), use_cache=False).logits
    return _scores(rows, _picked(logits, rows, list(map(len, whole))), lambda picked: picked)


def _hidden(model: Any, rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
    """States (B, T, C) that hold those of all scored tokens, and where each row ends in them."""
    device = _device(model)
    shared = list(dict.fromkeys(tuple(row.context) for row in rows))
    # The last token of a context is read again with each row: its state predicts the first token.
    prefixes = [list(context[:-1]) for context in shared]
    rests = [[row.context[-1], *row.tokens[:-1]] for row in rows]
    longest, rest = max(map(len, prefixes)), max(map(len, rests))
    whole = [[*row.context[:-1], *rest] for row, rest in zip(rows, rests, strict=True)]
    width = max(map(len, whole))
    reads_less = len(shared) * longest + len(rows) * rest < len(rows) * width
    # The padding of the rests has positions, too, which must exist.
    _, limit = batch_context(model.config)
    fits = limit is None or longest + rest <= limit
    if not min(map(len, prefixes)) or not reads_less or not fits:
        return model.features(right_padded(whole, device)), list(map(len, whole))
    prefix = model.new_cache(len(shared), longest)
    model.features(right_padded(prefixes, device), prefix)
    prefix.set_lengths(list(map(len, prefixes)))
    cache = model.new_cache(len(rows), longest + rest)
    places = {context: place for place, context in enumerate(shared)}
    cache.fill(prefix, torch.tensor([places[tuple(r.context)] for r in rows], device=device))
    return model.features(right_padded(rests, device), cache), list(map(len, rests))


def _picked(states: Tensor, rows: Sequence[Row], ends: Sequence[int]) -> Tensor:
    """Of states (B, T, C) those that predict the scored tokens, (N, C)."""
    pairs = zip(rows, ends, strict=True)
    return torch.cat([states[b, end - len(row.tokens) : end] for b, (row, end) in enumerate(pairs)])


def _scores(rows: Sequence[Row], picked: Tensor, head: Callable[[Tensor], Tensor]) -> list[Scores]:
    """Of states (N, C) and the head that makes logits of them."""
    targets = torch.tensor([i for row in rows for i in row.tokens], device=picked.device)
    found, greedy = [], []
    for states, asked in zip(picked.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.gather(1, asked.unsqueeze(1)).squeeze(1)
        found.append((chosen - logits.logsumexp(1)).double().cpu())
        greedy.append((logits.argmax(1) == asked).cpu())
    counts = [len(row.tokens) for row in rows]
    parts = zip(torch.cat(found).split(counts), torch.cat(greedy).split(counts), strict=True)
    return [Scores(*part) for part in parts]


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
