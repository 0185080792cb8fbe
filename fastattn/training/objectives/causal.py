"""Causal language modelling: the next token of a text (Radford et al. 2018).

Documents are cut and joined to rows of a given number of tokens, without padding; each attends only
to itself, and its positions begin at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from fastattn.training.contract import Batch, Example, Objective, Record
from fastattn.training.objectives.collation import packed_batch


@dataclass(frozen=True)
class CausalSettings:
    """How a causal language model is trained.

    Attributes:
        field: of a record, the text.
    """

    field: str = "text"


class Causal(Objective):
    """The next token of a text; a document ends with the end-of-text token."""

    name = "causal"
    settings_class = CausalSettings
    fields = ("input_ids",)
    packs = True
    of_text = True

    def encode(self, record: Record) -> Iterable[Example]:
        text = self.text(record, self.settings.field)
        ids = [*self.tokenizer.encode(text), self.tokenizer.end_of_text]
        yield {"input_ids": numpy.array(ids)}

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        ids = [example["input_ids"] for example in examples]
        return packed_batch(ids, ids, self.interface)
