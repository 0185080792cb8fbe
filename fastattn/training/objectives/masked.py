"""Masked language modelling: the tokens that were hidden in a text (Devlin et al. 2018).

Of the positions that are chosen, 80% become the mask token, 10% a random token, and 10% stay as
they are. They are chosen again each time that an example is read (Liu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from fastattn.nn.checks import check_bool, check_integer, check_within
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Example, Objective, Record
from fastattn.training.objectives.collation import padded, padded_inputs
from fastattn.training.tokenizer import Tokenizer

MASKED, REPLACED = 0.8, 0.1  # shares of the chosen positions

# Scripts without spaces between words, as ranges [begin, end): kana, and Han with its extensions.
_UNSPACED = (0x3040, 0x3100, 0x3400, 0x4DC0, 0x4E00, 0xA000, 0xF900, 0xFB00, 0x20000, 0x40000)


@dataclass(frozen=True)
class MaskedSettings:
    """How a masked language model is trained.

    Attributes:
        field: of a record, the text.
        context: tokens of an example at most; a longer text makes several examples.
        probability: of a token to be chosen.
        whole_words: choose words with all their tokens. A word is a run of letters, digits or other
            signs; of Chinese and Japanese, which have no spaces, a character, or those that one
            token joins.
    """

    field: str = "text"
    context: int = 512
    probability: float = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        check_integer("context", self.context, at_least=3)  # a token between "cls" and "sep"
        check_within("probability", self.probability, "(0, 1]")
        check_bool("whole_words", self.whole_words)


class Masked(Objective):
    """The tokens that were hidden in a text; `starts` is 1 where a token begins a word."""

    name = "masked"
    settings_class = MaskedSettings
    fields = ("input_ids", "starts")
    model_class = "EncoderForMaskedLM"
    auto_class = "AutoModelForMaskedLM"
    roles = ("mask", "cls", "sep", "pad")

    def _derive(self) -> None:
        tokenizer = self.tokenizer
        self.mask = tokenizer.token("mask")
        ids = set(tokenizer.vocabulary.values())  # some tokenizers leave numbers out
        self._ordinary = numpy.array(sorted(ids - tokenizer.special_ids))
        self._choosable: numpy.ndarray = numpy.zeros(max(ids) + 1, dtype=bool)
        self._choosable[self._ordinary] = True
        self._before, self._after = (
            [tokenizer.token(role)] if role in tokenizer.roles else [] for role in ("cls", "sep")
        )

    def choosable(self, ids: Any) -> numpy.ndarray:
        """Which of these tokens may be hidden: all but the special ones."""
        return self._choosable[ids]

    def encode(self, record: Record) -> Iterable[Example]:
        """Blocks of the text, each between the tokens "cls" and "sep" where the tokenizer has them.

        A block without a token that could be chosen, of special tokens only, makes no example.
        """
        text = self.text(record, self.settings.field)
        if self.settings.whole_words:
            ids, starts = _words(self.tokenizer, text)
        else:
            ids = self.tokenizer.encode(text)
            starts = [1] * len(ids)
        room = self.settings.context - len(self._before) - len(self._after)
        for first in range(0, len(ids), room):
            block = ids[first : first + room]
            if self.choosable(block).any():
                begins = [1, *starts[first + 1 : first + room]]
                before, after = [1] * len(self._before), [1] * len(self._after)
                yield {
                    "input_ids": numpy.array([*self._before, *block, *self._after]),
                    "starts": numpy.array([*before, *begins, *after]),
                }

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        rows: list[numpy.ndarray] = [
            example["input_ids"].astype(numpy.int64) for example in examples
        ]
        ids = numpy.concatenate(rows)
        # An example begins with a word, so that words can be counted through the batch.
        starts = numpy.concatenate([example["starts"] for example in examples])
        word = starts.astype(numpy.int64).cumsum() - 1
        choosable = self.choosable(ids)
        chosen = (random.random(word[-1] + 1) < self.settings.probability)[word] & choosable
        if not chosen.any():  # a mean over nothing would be NaN
            chosen = choosable & (word == random.choice(word[choosable]))
        labels = numpy.where(chosen, ids, IGNORED)
        fate = random.random(len(ids))
        drawn = random.choice(self._ordinary, len(ids))
        ids = numpy.where(chosen & (fate < MASKED), self.mask, ids)
        ids = numpy.where(chosen & (fate >= MASKED) & (fate < MASKED + REPLACED), drawn, ids)
        ends = numpy.cumsum([len(row) for row in rows])[:-1]
        arguments = padded_inputs(numpy.split(ids, ends), self.tokenizer)
        arguments["labels"] = padded(numpy.split(labels, ends), IGNORED)
        return Batch(arguments, int(chosen.sum()), len(ids))


def _words(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The tokens, and 1 for each that begins a word."""
    ids, offsets, word = tokenizer.words(text)
    codes = numpy.frombuffer((text + " ").encode("utf-32-le"), dtype="<u4")
    unspaced = numpy.searchsorted(_UNSPACED, codes, side="right") % 2 == 1
    first = offsets[1:, 0]  # of each token but the first its first character
    last: numpy.ndarray = offsets[:-1, 1] - 1  # of the token before its last one
    apart = first > last  # else both are parts of one character
    between = apart & (unspaced[first] | unspaced[last])
    starts: numpy.ndarray = numpy.ones(len(ids), dtype=numpy.int64)
    starts[1:] = between | (word[1:] != word[:-1]) | (word[1:] < 0)
    return ids.tolist(), starts.tolist()
