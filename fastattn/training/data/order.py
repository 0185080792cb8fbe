"""Examples to batches by their number, each a pure function of the seed and the number.

Epoch after epoch has the examples in another order; one begins where the one before ends, in the
middle of a batch too, so that in an epoch nothing is dropped and nothing is read twice. A step that
has several batches, or several devices, takes the next numbers: rank r of R takes the batches
k R + r, and the order of the data does not depend on R.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy

from fastattn.nn.checks import check_integer, check_positive, check_seed
from fastattn.training.contract import Batch, Batches, Example, Objective
from fastattn.training.data.storage import Examples

# The uses of random numbers; each has streams of its own.
ORDER, TRAINING, EVALUATION = range(3)


class Shuffled(Batches):
    """Batches of `batch_size` whole examples."""

    def __init__(
        self, examples: Sequence[Example], objective: Objective, batch_size: int, seed: int
    ) -> None:
        """
        Args:
            seed: of the order, and of whatever `objective` draws.

        Raises:
            ValueError: there are fewer examples than one batch has; or an argument is out of range.
        """
        self.examples = examples
        self.objective = objective
        self.batch_size = check_positive("batch_size", batch_size)
        self.seed = _unsigned(seed)
        if len(examples) < batch_size:
            raise ValueError(
                f"there are {len(examples)} examples, fewer than batch_size ({batch_size}): give "
                "more data or smaller batches"
            )
        self._order = _Kept(functools.partial(_permutation, self.seed, len(examples)))

    @property
    def per_epoch(self) -> float:
        """How many batches have as many examples as there are."""
        return len(self.examples) / self.batch_size

    def batch(self, index: int) -> Batch:
        first = index * self.batch_size
        places = (
            divmod(place, len(self.examples)) for place in range(first, first + self.batch_size)
        )
        examples = [self.examples[self._order(epoch)[place]] for epoch, place in places]
        return self.objective.collate(examples, _random(self.seed, TRAINING, index))

    def once(self, first: int = 0, step: int = 1) -> Iterator[Batch]:
        starts = range(0, len(self.examples), self.batch_size)
        for index, start in list(enumerate(starts))[first::step]:
            last = min(start + self.batch_size, len(self.examples))
            examples = [self.examples[i] for i in range(start, last)]
            yield self.objective.collate(examples, _random(self.seed, EVALUATION, index))


class Packed(Batches):
    """Batches of exactly `tokens` tokens, of examples that are cut and joined, without padding.

    An epoch's examples, one after the other, are a stream, of which each batch is the next
    `tokens`. Each of its pieces is of one example and has at most `context` tokens.
    """

    def __init__(
        self, examples: Examples, objective: Objective, tokens: int, context: int, seed: int
    ) -> None:
        """
        Args:
            seed: of the order, and of whatever `objective` draws.

        Raises:
            ValueError: the objective does not pack; its fields have not the same lengths; there are
                fewer tokens than one batch has; or an argument is out of range.
        """
        self.examples = examples
        self.objective = objective
        self.tokens = check_positive("tokens", tokens)
        self.context = check_positive("context", context)
        self.seed = _unsigned(seed)
        if not objective.packs:
            raise ValueError(
                f"the objective {objective.name!r} needs whole examples: take Shuffled, with a "
                "number of examples a batch"
            )
        if (examples.sizes != examples.sizes[:, :1]).any():
            raise ValueError(
                f"the fields {', '.join(examples.fields)} of an example that is packed must have "
                "the same length"
            )
        self._lengths = examples.lengths
        self._total = int(self._lengths.sum())
        if self._total < tokens:
            raise ValueError(
                f"there are {self._total} tokens, fewer than a batch has ({tokens}): give more "
                "data or smaller batches"
            )
        self._stream = _Kept(self._shuffled)

    @property
    def per_epoch(self) -> float:
        """How many batches have as many tokens as there are."""
        return self._total / self.tokens

    def batch(self, index: int) -> Batch:
        pieces: list[Example] = []
        place, end = index * self.tokens, (index + 1) * self.tokens
        while place < end:
            epoch, first = divmod(place, self._total)
            last = min(first + end - place, self._total)
            pieces += self._pieces(self._stream(epoch), first, last)
            place += last - first
        return self.objective.collate(pieces, _random(self.seed, TRAINING, index))

    def once(self, first: int = 0, step: int = 1) -> Iterator[Batch]:
        stream = _Stream(numpy.arange(len(self.examples)), self._lengths.cumsum())
        starts = range(0, self._total, self.tokens)
        for index, start in list(enumerate(starts))[first::step]:
            last = min(start + self.tokens, self._total)
            pieces = list(self._pieces(stream, start, last))
            yield self.objective.collate(pieces, _random(self.seed, EVALUATION, index))

    def _pieces(self, stream: _Stream, first: int, last: int) -> Iterator[Example]:
        """The tokens first .. last - 1 of a stream."""
        i = int(numpy.searchsorted(stream.ends, first, side="right"))
        while first < last:
            example, end = int(stream.order[i]), int(stream.ends[i])
            begin = end - int(self._lengths[example])
            cut = min(end, last, first + self.context)
            yield self.examples.piece(example, first - begin, cut - begin)
            first = cut
            i += cut == end

    def _shuffled(self, epoch: int) -> _Stream:
        order = _permutation(self.seed, len(self.examples), epoch)
        return _Stream(order, self._lengths[order].cumsum())


class _Stream(NamedTuple):
    """Examples, one after the other: example order[i] ends before token ends[i]."""

    order: numpy.ndarray
    ends: numpy.ndarray


class _Kept:
    """A function of an epoch whose two last values are kept: a batch may lie in two epochs."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function
        self._values: dict[int, Any] = {}

    def __call__(self, epoch: int) -> Any:
        values = self._values
        if epoch not in values:
            values = {**dict([*values.items()][-1:]), epoch: self._function(epoch)}
            self._values = values  # in one step: threads may prepare batches
        return values[epoch]


def _permutation(seed: int, count: int, epoch: int) -> numpy.ndarray:
    """(count,): the order of the examples in an epoch.

    It is made by sorting: numpy promises the bits of a generator, but not its permutations, and a
    run goes on with another numpy too.
    """
    return numpy.argsort(_bits(seed, ORDER, epoch).random_raw(count), kind="stable")


def _random(seed: int, use: int, number: int) -> numpy.random.Generator:
    return numpy.random.Generator(_bits(seed, use, number))


def _bits(seed: int, use: int, number: int) -> numpy.random.Philox:
    """Bits of their own for each use and number: Philox (Salmon et al. 2011), 2**192 steps each."""
    words = numpy.array([seed, use, 0, 0, 0, number], dtype=numpy.uint64)
    return numpy.random.Philox(key=words[:2], counter=words[2:])


def _unsigned(seed: int) -> int:
    """A seed as torch takes it, in 64 bits without a sign."""
    check_seed("seed", check_integer("seed", seed))
    return seed % 2**64
