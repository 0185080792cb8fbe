"""How surprised a masked language model is by a text: each token hidden in turn.

A masked language model has no probability of a text. The sum over its tokens of

    log p(token | all the others)

takes that place (Salazar et al. 2020, arXiv:1910.14659), without anything drawn. It costs a row of
a batch for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy
import torch

from fastattn.nn.checks import check_integer
from fastattn.nn.mode import in_mode
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Example, loss_of
from fastattn.training.evaluation import metrics
from fastattn.training.objectives.collation import padded, padded_inputs
from fastattn.training.objectives.masked import Masked

Row = tuple[numpy.ndarray, numpy.ndarray]  # tokens with one hidden, and the labels


@torch.inference_mode()
def pseudo_perplexity(
    model: torch.nn.Module,
    objective: Masked,
    examples: Iterable[Example],
    *,
    batch_size: int = 8,
    on_progress: Callable[[int], object] | None = None,
) -> tuple[float, int]:
    """exp of the mean of -log p over all tokens but the special ones, and their number.

    Args:
        model: a masked language model, of this package or of transformers.
        objective: with the model's tokenizer and interface.
        examples: of `objective.encode`.
        batch_size: rows a call; the figure is the same at any, but for the last digits.
        on_progress: called after each batch with the rows that it had.

    Raises:
        ValueError: there is no token to predict, or batch_size is below 1.
    """
    check_integer("batch_size", batch_size, at_least=1)
    device = next(model.parameters()).device
    nats, tokens = 0.0, 0
    with in_mode(model, training=False):
        for rows in _batches(objective, examples, batch_size):
            arguments = padded_inputs([ids for ids, _ in rows], objective.tokenizer)
            arguments["labels"] = padded([labels for _, labels in rows], IGNORED)
            moved = {name: tensor.to(device) for name, tensor in arguments.items()}
            nats += loss_of(model(**moved)).item() * len(rows)  # a row has one target
            tokens += len(rows)
            if on_progress is not None:
                on_progress(len(rows))
    if not tokens:
        raise ValueError("the examples have no token but special ones: there is nothing to predict")
    return metrics.perplexity(nats, tokens), tokens


def _batches(
    objective: Masked, examples: Iterable[Example], batch_size: int
) -> Iterator[list[Row]]:
    """The rows of all examples, in their order."""
    rows: list[Row] = []
    for example in examples:
        ids: numpy.ndarray = example["input_ids"].astype(numpy.int64)
        for place in objective.choosable(ids).nonzero()[0]:
            hidden: numpy.ndarray = ids.copy()
            labels: numpy.ndarray = numpy.full_like(ids, IGNORED)
            hidden[place], labels[place] = objective.mask, ids[place]
            rows.append((hidden, labels))
            if len(rows) == batch_size:
                yield rows
                rows = []
    if rows:
        yield rows
