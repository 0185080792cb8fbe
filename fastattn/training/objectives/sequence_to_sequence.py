"""Sequence to sequence: a text to another (Sutskever et al. 2014): translation, summaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from fastattn.nn.checks import check_integer
from fastattn.training.contract import Batch, Example, Objective, Record
from fastattn.training.objectives.collation import encoder_decoder_batch


@dataclass(frozen=True)
class SequenceToSequenceSettings:
    """How a model learns to turn a text into another.

    Attributes:
        source: of a record, the text that is read.
        target: of a record, the text that is written.
        prefix: a text before each source, as T5's "translate English to German: ".
        max_source_length: tokens of a source, special ones included; a longer one is cut.
        max_target_length: tokens of a target, special ones included; a longer one is cut.
    """

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    max_source_length: int = 512
    max_target_length: int = 512

    def __post_init__(self) -> None:
        for name in ("max_source_length", "max_target_length"):
            check_integer(name, getattr(self, name), at_least=3)  # a token between the special ones


class SequenceToSequence(Objective):
    """The text that belongs to another.

    Both begin with the token "cls" where the tokenizer has one (BART's), and end with the end of
    text.
    """

    name = "sequence_to_sequence"
    settings_class = SequenceToSequenceSettings
    fields = ("input_ids", "targets")
    model_class = "EncoderDecoder"
    auto_class = "AutoModelForSeq2SeqLM"
    roles = ("pad",)
    of_text = True

    def _derive(self) -> None:
        self._before = [self.tokenizer.token("cls")] if "cls" in self.tokenizer.roles else []

    def encode(self, record: Record) -> Iterable[Example]:
        target = self.text(record, self.settings.target)
        yield {
            "input_ids": self.source_ids(self.text(record, self.settings.source)),
            "targets": self._encoded(target, "max_target_length"),
        }

    def source_ids(self, text: str) -> numpy.ndarray:
        """The tokens that the model reads of a text, (n,): prefix, text, special tokens."""
        return self._encoded(self.settings.prefix + text, "max_source_length")

    def _encoded(self, text: str, limit: str) -> numpy.ndarray:
        room = getattr(self.settings, limit) - len(self._before) - 1
        ids = self.cut(self.tokenizer.encode(text), room, limit)
        return numpy.array([*self._before, *ids, self.tokenizer.end_of_text])

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        sources, targets = ([example[name] for example in examples] for name in self.fields)
        return encoder_decoder_batch(sources, targets, self.tokenizer, self.interface)
