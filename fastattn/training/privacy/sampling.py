"""Poisson sampling: each example joins each step by a coin of its own; steps differ in size.

It is what the accountants of differential privacy assume. Batches of a shuffled epoch have another
privacy, which they do not bound.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.checks import check_positive
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Batches, Example, Objective
from fastattn.training.data.storage import Examples

SAMPLING, COLLATION, NOISE = range(3)  # the uses of a key's random numbers
# Those whose examples are independent of each other in a batch, and whose loss is the model's.
OBJECTIVES = ("causal", "chat", "classification")


class Key:
    """128 secret bits, of which all random numbers of a private run follow, by use and step."""

    def __init__(self, bits: int) -> None:
        self._words = numpy.array([bits >> 64, bits & (2**64 - 1)], dtype=numpy.uint64)

    def generator(self, use: int, number: int) -> numpy.random.Generator:
        counter = numpy.array([0, 0, use, number], dtype=numpy.uint64)
        return numpy.random.Generator(numpy.random.Philox(key=self._words, counter=counter))

    @property
    def fingerprint(self) -> str:
        """Tells keys apart."""
        return hashlib.sha256(self._words.tobytes()).hexdigest()[:16]


class Sampled(Batches):
    """Batches of whole examples, each in a batch with the probability `rate`; one may be empty.

    An example has one row of a batch, padded to the longest: the arguments of a batch are tensors
    (B, ...), and those of each row are an example's. A text that is longer than the context is cut.

    Attributes:
        rate: batch_size / examples.
        cut: how many examples are longer than the context.
    """

    def __init__(
        self, examples: Examples, objective: Objective, batch_size: int, context: int, key: Key
    ) -> None:
        """
        Args:
            batch_size: the mean number of examples in a batch.
            context: tokens of an example at most, where the objective cuts none itself.

        Raises:
            ValueError: the objective's examples cannot be told apart, several are of one record,
                or there are fewer than `batch_size`.
        """
        if objective.name not in OBJECTIVES or objective.interface != "fastattn":
            raise ValueError(
                "[privacy] clips the gradient of each example, which is known for models of "
                f'library "fastattn" with the objectives {", ".join(OBJECTIVES)}; got the library '
                f"{objective.interface!r} with {objective.name!r}"
            )
        if len(numpy.unique(examples.records)) < len(examples):
            raise ValueError(
                "[privacy] several examples are of one record, whose privacy would be less than "
                "epsilon says: give an objective that makes one example of a record"
            )
        if len(examples) < check_positive("batch_size", batch_size):
            raise ValueError(
                f"there are {len(examples)} examples, fewer than batch_size ({batch_size}): give "
                "more data or smaller batches"
            )
        self.examples = examples
        self.objective = objective
        self.batch_size = batch_size
        self.context = check_positive("context", context)
        self.key = key
        self.rate = batch_size / len(examples)
        self.cut = int((examples.lengths > context).sum()) if objective.packs else 0

    @property
    def per_epoch(self) -> float:
        """How many batches have as many examples as there are, in the mean."""
        return 1 / self.rate

    def batch(self, index: int) -> Batch:
        # Integers: that 64 bits are below a limit does not depend on a way to make floats of them.
        bits = self.key.generator(SAMPLING, index).bit_generator.random_raw(len(self.examples))
        limit = int(self.rate * 2**64)
        joins = bits < numpy.uint64(limit) if limit < 2**64 else numpy.ones(len(bits), dtype=bool)
        return self._rows(numpy.flatnonzero(joins), index)

    def once(self, first: int = 0, step: int = 1) -> Iterator[Batch]:
        starts = range(0, len(self.examples), self.batch_size)
        for index, start in list(enumerate(starts))[first::step]:
            last = min(start + self.batch_size, len(self.examples))
            yield self._rows(numpy.arange(start, last), index)

    def _rows(self, chosen: numpy.ndarray, index: int) -> Batch:
        """A row for each of the chosen examples, but for those of which no target counts."""
        random = self.key.generator(COLLATION, index)
        if not self.objective.packs:
            examples = [self.examples[int(i)] for i in chosen]
            return self.objective.collate(examples, random) if examples else Batch({}, 0, 0)
        single = [self.objective.collate([self._piece(int(i))], random) for i in chosen]
        # By length, so that rows whose gradients are made together have little padding.
        return _stacked(sorted((b for b in single if b.counted), key=lambda batch: batch.tokens))

    def _piece(self, i: int) -> Example:
        return self.examples.piece(i, 0, min(int(self.examples.lengths[i]), self.context))


def _stacked(batches: Sequence[Batch]) -> Batch:
    """The rows "input_ids" and "targets" (1, T) of packed batches of one sequence, as (B, T).

    A causal model sees no padding that follows.
    """
    if not batches:
        return Batch({}, 0, 0)
    width = max(batch.tokens for batch in batches)

    def rows(name: str, value: int) -> Tensor:
        each = [batch.arguments[name] for batch in batches]
        return torch.cat([F.pad(row, (0, width - row.shape[1]), value=value) for row in each])

    arguments: dict[str, Any] = {
        "input_ids": rows("input_ids", 0),
        "targets": rows("targets", IGNORED),
        "keep_logits": False,
    }
    return Batch(arguments, sum(b.counted for b in batches), sum(b.tokens for b in batches))
