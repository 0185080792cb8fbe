"""Span corruption: the spans that were cut out of a text (Raffel et al. 2020, T5).

    text        Thank you for inviting me to your party last week .
    inputs      Thank you <extra_id_0> me to your party <extra_id_1> week . </s>
    targets     <extra_id_0> for inviting <extra_id_1> last </s>

As in T5's own code, a text begins with a token that stays and ends with a span that was cut out
(unlike the example), so that no sentinel is needed at the end of the targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from fastattn.nn.checks import check_integer, check_within
from fastattn.training.contract import Batch, Example, Objective, Record
from fastattn.training.objectives.collation import encoder_decoder_batch

SENTINELS = 100  # T5's: enough for contexts of 1,800 tokens


@dataclass(frozen=True)
class SpanCorruptionSettings:
    """How a model learns to fill in spans.

    Attributes:
        field: of a record, the text.
        context: tokens of the corrupted text at most; a longer text makes several examples.
        noise_density: share of the tokens that are cut out.
        mean_span_length: mean number of tokens of a span.
    """

    field: str = "text"
    context: int = 512
    noise_density: float = 0.15
    mean_span_length: float = 3.0

    def __post_init__(self) -> None:
        check_integer("context", self.context, at_least=3)  # a token, a sentinel, the end of text
        check_within("noise_density", self.noise_density, "(0, 1)")
        check_within("mean_span_length", self.mean_span_length, "[1, inf)", "finite and at least 1")

    def counts(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens, at least 2, are cut out, and in how many spans."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = min(max(round(noise / self.mean_span_length), 1), length - noise)
        return noise, spans

    def corrupted_length(self, length: int) -> int:
        """How many tokens the inputs have: those that stay, the sentinels, and the end of text."""
        noise, spans = self.counts(length)
        return length - noise + spans + 1


class SpanCorruption(Objective):
    """The spans that were cut out of a text, drawn again each time that it is read."""

    name = "span_corruption"
    settings_class = SpanCorruptionSettings
    fields = ("input_ids",)
    model_class = "EncoderDecoder"
    auto_class = "AutoModelForSeq2SeqLM"
    roles = ("pad",)
    extra_tokens = tuple(f"<extra_id_{i}>" for i in reversed(range(SENTINELS)))  # as T5's ids

    def _derive(self) -> None:
        self._sentinels: list[int] = []
        while (i := self.tokenizer.token_to_id(f"<extra_id_{len(self._sentinels)}>")) is not None:
            self._sentinels.append(i)
        # Tokens of a text whose corruption just fits; the last one of them that does.
        fits = itertools.takewhile(
            lambda n: self.settings.corrupted_length(n) <= self.settings.context, itertools.count(2)
        )
        self._block = max(fits, default=0)
        needed = self.settings.counts(self._block)[1]
        if needed > len(self._sentinels):
            raise ValueError(
                f"a context of {self.settings.context} tokens needs the sentinels <extra_id_0> to "
                f"<extra_id_{needed - 1}>, and the tokenizer has {len(self._sentinels)} of them: "
                "train one with them as extra_tokens, take a T5's, or a shorter context"
            )

    def encode(self, record: Record) -> Iterable[Example]:
        """Blocks of the text. One of a single token has nothing to cut out, and is left out."""
        ids = self.tokenizer.encode(self.text(record, self.settings.field))
        for first in range(0, len(ids), self._block):
            block = ids[first : first + self._block]
            if len(block) > 1:
                yield {"input_ids": numpy.array(block)}

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        pairs = [self._corrupted(example["input_ids"], random) for example in examples]
        sources, targets = zip(*pairs, strict=True)
        return encoder_decoder_batch(sources, targets, self.tokenizer, self.interface)

    def _corrupted(
        self, ids: numpy.ndarray, random: numpy.random.Generator
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The inputs and the targets: what stays and what is cut out, with sentinels between."""
        noise, spans = self.settings.counts(len(ids))
        kept, cut = _parts(len(ids) - noise, spans, random), _parts(noise, spans, random)
        tokens = iter(ids.tolist())
        inputs: list[int] = []
        targets: list[int] = []
        for sentinel, stay, leave in zip(self._sentinels, kept, cut):
            inputs += [*itertools.islice(tokens, stay), sentinel]
            targets += [sentinel, *itertools.islice(tokens, leave)]
        end = self.tokenizer.end_of_text
        return numpy.array([*inputs, end]), numpy.array([*targets, end])


def _parts(total: int, count: int, random: numpy.random.Generator) -> list[int]:
    """`count` positive lengths whose sum is `total`; each such list is as probable as another."""
    cuts = sorted(random.permutation(total - 1)[: count - 1].tolist())
    ends = [0, *(cut + 1 for cut in cuts), total]
    return [end - begin for begin, end in itertools.pairwise(ends)]
