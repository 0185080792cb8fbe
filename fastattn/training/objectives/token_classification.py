"""Classification of words: names of people and places, in IOB2 tags (Tjong Kim Sang 2002)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from fastattn.nn.checks import check_integer
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Example, Objective, Record, loss_of
from fastattn.training.evaluation import metrics
from fastattn.training.objectives import sequences
from fastattn.training.objectives.collation import padded


@dataclass(frozen=True)
class TokenClassificationSettings:
    """How a tagger of words is trained.

    Attributes:
        labels: the tags in the order of their numbers: "O", "B-..." and "I-...".
        words_field: of a record, the list of its words.
        tags_field: of a record, the list of their tags: names or numbers.
        separator: stands between two words of the text: a space, or "" for Chinese.
        context: most tokens of an example, special ones too; words beyond it are cut off.
    """

    labels: tuple[str, ...] = ()
    words_field: str = "tokens"
    tags_field: str = "tags"
    separator: str = " "
    context: int = 512

    def __post_init__(self) -> None:
        check_integer("context", self.context, at_least=1)


class TokenClassification(Objective):
    """A tag for each word; of a word that has several tokens the first one has it.

    Each word is encoded separately, with the separator before it, so that no token is of two words.

    Attributes:
        labels: the tags; a model's `label_names`.
    """

    name = "token_classification"
    settings_class = TokenClassificationSettings
    fields = ("input_ids", "token_type_ids", "labels")
    model_class = "EncoderForTokenClassification"
    auto_class = "AutoModelForTokenClassification"
    roles = ("cls", "sep", "pad")

    def _derive(self) -> None:
        self.labels = sequences.check_labels(self.settings.labels)
        metrics.spans(self.labels)  # they are IOB2's
        self._layout = self.tokenizer.layout()
        self._room = sequences.room(self._layout, self.settings.context)

    def encode(self, record: Record) -> Iterable[Example]:
        words = self._list(record, self.settings.words_field)
        tags = self._list(record, self.settings.tags_field)
        if len(words) != len(tags):
            raise ValueError(
                f"a record has {len(words)} words in {self.settings.words_field!r} and {len(tags)} "
                f"tags in {self.settings.tags_field!r}: each word needs one"
            )
        numbers = [sequences.number_of(tag, self.labels, self.settings.tags_field) for tag in tags]
        encoded = self._encoded(words)
        ids = [i for word in encoded for i in word]
        labels = numpy.full(len(ids), IGNORED)
        labels[numpy.cumsum([0, *map(len, encoded[:-1])])] = numbers
        example = sequences.joined(self._layout, [self.cut(ids, self._room, "context")])
        before, after = len(self._layout.before), len(self._layout.after)
        example["labels"] = numpy.pad(
            labels[: self._room], (before, after), constant_values=IGNORED
        )
        yield example

    def _list(self, record: Record, field: str) -> Sequence[object]:
        value = self.value(record, field)
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ValueError(
                f"the field {field!r} of a record must be a list that is not empty, got {value!r}"
            )
        return value

    def _encoded(self, words: Sequence[object]) -> list[list[int]]:
        """The tokens of each word, at least one."""
        texts: list[str] = []
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise ValueError(
                    f"the field {self.settings.words_field!r} of a record must hold words, got "
                    f"{word!r}"
                )
            texts.append(self.settings.separator + word if texts else word)
        encoded = self.tokenizer.encode_many(texts, literal=True)
        # A tokenizer's normaliser may leave nothing of a word, of control characters for instance.
        return [ids or [self.tokenizer.token("unk")] for ids in encoded]

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        labels = padded([example["labels"] for example in examples], IGNORED)
        counted = int((labels != IGNORED).sum())
        return sequences.batch_of(examples, self.tokenizer, {"labels": labels}, counted)

    def observe(self, model: torch.nn.Module, batch: Batch) -> Any:
        output = model(**batch.arguments)
        loss = loss_of(output).item() * batch.counted if batch.counted else 0.0
        tags = []
        for given, wanted in zip(output.logits.argmax(-1), batch.arguments["labels"]):
            counts = wanted != IGNORED
            tags.append((given[counts].tolist(), wanted[counts].tolist()))
        return loss, tags

    def conclude(self, observed: Iterable[Any]) -> dict[str, float]:
        """ "loss", "accuracy" of the words' tags, "precision", "recall" and "f1" of the spans."""
        loss = 0.0
        predictions: list[list[str]] = []
        references: list[list[str]] = []
        for of_batch, tags in observed:
            loss += of_batch
            for given, wanted in tags:
                predictions.append([self.labels[number] for number in given])
                references.append([self.labels[number] for number in wanted])
        if not references:
            raise ValueError("the validation data have no example")
        given_tags = [tag for tags in predictions for tag in tags]
        wanted_tags = [tag for tags in references for tag in tags]
        return {
            "loss": loss / len(wanted_tags),
            "accuracy": metrics.accuracy(given_tags, wanted_tags),
            **metrics.span_scores(predictions, references)._asdict(),
        }
