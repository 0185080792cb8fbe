"""An objective without a model: records are lists of numbers, a batch shows what it was made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy

from fastattn.training.contract import Batch, Example, Objective, Record
from fastattn.training.data import Examples, prepare


@dataclass(frozen=True)
class NumbersSettings:
    field: str = "ids"


class Numbers(Objective):
    """{"ids": [[...], ...]} is an example for each list."""

    name = "numbers"
    settings_class = NumbersSettings
    fields = ("ids",)
    packs = True

    def __init__(self, settings: NumbersSettings | None = None) -> None:
        tokenizer = SimpleNamespace(fingerprint="of no tokenizer")
        super().__init__(tokenizer, settings)

    def encode(self, record: Record) -> Iterable[Example]:
        for ids in record[self.settings.field]:
            yield {"ids": numpy.array(ids)}

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        pieces = tuple(example["ids"].tolist() for example in examples)
        return Batch({"pieces": pieces, "drawn": random.integers(2**63)}, 1, sum(map(len, pieces)))


class Pairs(Numbers):
    """Two fields of lengths that differ."""

    name = "pairs"
    fields = ("source", "target")

    def encode(self, record: Record) -> Iterable[Example]:
        for source, target in record["pairs"]:
            yield {"target": numpy.array(target), "source": numpy.array(source)}


def write_records(path: Path, records: Iterable[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(folder: Path, lengths: Sequence[int]) -> tuple[Examples, list[list[int]]]:
    """Prepared examples of these lengths, a record each, and the same as lists.

    The numbers count through, so that each says where it is from.
    """
    ends = numpy.cumsum(lengths).tolist()
    lists = [list(range(end - length, end)) for length, end in zip(lengths, ends)]
    path = write_records(folder / "data.jsonl", ({"ids": [ids]} for ids in lists))
    return prepare(path, Numbers(), folder / "examples"), lists
