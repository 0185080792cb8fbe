"""Causal language modelling: the next token of a text (Radford et al. 2018).

Documents are cut and joined to rows of a given number of tokens, without padding; each attends only
to itself, and its positions begin at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch

from fastattn.nn import PackedSequences
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Example, Interface, Objective, Record
from fastattn.training.tokenizer import Tokenizer


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

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: CausalSettings | None = None,
        interface: Interface = "fastattn",
    ) -> None:
        super().__init__(tokenizer, settings or CausalSettings(), interface)

    def encode(self, record: Record) -> Iterable[Example]:
        text = self.text(record, self.settings.field)
        ids = [*self.tokenizer.encode(text), self.tokenizer.end_of_text]
        yield {"input_ids": numpy.array(ids)}

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        rows: list[numpy.ndarray] = [
            example["input_ids"].astype(numpy.int64) for example in examples
        ]
        ids = torch.from_numpy(numpy.concatenate(rows)).unsqueeze(0)  # (1, tokens)
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:]
        lengths = torch.tensor([len(row) for row in rows])
        ends = lengths.cumsum(0)
        targets[:, ends - 1] = IGNORED  # the next token is another document's
        starts = torch.nn.functional.pad(ends, (1, 0)).int()
        packed = PackedSequences(starts, int(lengths.max()))
        counted = ids.numel() - len(rows)
        arguments = {"input_ids": ids, "targets": targets, "packed": packed}
        return Batch(arguments, counted, ids.numel())
