"""Classification of texts, or of pairs of texts (Devlin et al. 2018, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from fastattn.nn.checks import check_integer
from fastattn.training.contract import Batch, Example, Objective, Record, loss_of
from fastattn.training.evaluation import metrics
from fastattn.training.objectives import sequences


@dataclass(frozen=True)
class ClassificationSettings:
    """How a classifier of texts is trained.

    Attributes:
        labels: the classes by name, in the order of their numbers.
        field: of a record, the text.
        pair_field: of a record, the second text; none if it is empty.
        label_field: of a record, its class: a name or a number.
        context: most tokens of an example, special ones too; the longer text is cut to fit.
    """

    labels: tuple[str, ...] = ()
    field: str = "text"
    pair_field: str = ""
    label_field: str = "label"
    context: int = 512

    def __post_init__(self) -> None:
        check_integer("context", self.context, at_least=1)


class Classification(Objective):
    """One class of a text, or of two.

    The classes are listed in the settings and not collected from the data: a number means the same
    in each run, and a misspelt label in the data is an error, not a class of its own.

    Attributes:
        labels: the classes by name; a model's `label_names`.
    """

    name = "classification"
    settings_class = ClassificationSettings
    fields = ("input_ids", "token_type_ids", "label")
    model_class = "EncoderForSequenceClassification"
    auto_class = "AutoModelForSequenceClassification"
    roles = ("cls", "sep", "pad")

    def _derive(self) -> None:
        settings = self.settings
        self.labels = sequences.check_labels(settings.labels)
        self._layout = self.tokenizer.layout(pair=bool(settings.pair_field))
        self._room = sequences.room(self._layout, settings.context)
        if settings.pair_field and not len(self._layout.between):
            raise ValueError(
                "pair_field needs a tokenizer that puts a token between two texts: train one with "
                'special_tokens={"cls": "<|cls|>", "sep": "<|sep|>"}, or take that of an encoder'
            )

    def encode(self, record: Record) -> Iterable[Example]:
        label = self.value(record, self.settings.label_field)
        number = sequences.number_of(label, self.labels, self.settings.label_field)
        yield {**self.inputs(record), "label": numpy.array([number])}

    def inputs(self, record: Record) -> Example:
        """An example without its label, as a model that is trained is asked."""
        fields = [self.settings.field]
        if self.settings.pair_field:
            fields.append(self.settings.pair_field)
        texts = [self.text(record, field) for field in fields]
        encoded = self.tokenizer.encode_many(texts, literal=True)
        if not all(encoded):
            empty = fields[[bool(ids) for ids in encoded].index(False)]
            raise ValueError(f"the field {empty!r} of a record has no token: {record[empty]!r}")
        lengths = [len(ids) for ids in encoded]
        kept = sequences.fitting(lengths[0], sum(lengths[1:]), self._room)
        return sequences.joined(
            self._layout, [self.cut(ids, count, "context") for ids, count in zip(encoded, kept)]
        )

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        labels = torch.tensor([int(example["label"][0]) for example in examples])
        return sequences.batch_of(examples, self.tokenizer, {"labels": labels}, len(examples))

    def observe(self, model: torch.nn.Module, batch: Batch) -> Any:
        output = model(**batch.arguments)
        loss = loss_of(output).item() * batch.counted
        return loss, output.logits.argmax(-1).tolist(), batch.arguments["labels"].tolist()

    def conclude(self, observed: Iterable[Any]) -> dict[str, float]:
        """ "loss", "accuracy", and "macro_f1", the mean of the F1 of the classes that occur."""
        loss, predictions, labels = 0.0, [], []
        for of_batch, given, wanted in observed:
            loss += of_batch
            predictions += given
            labels += wanted
        if not labels:
            raise ValueError("the validation data have no example")
        return {
            "loss": loss / len(labels),
            "accuracy": metrics.accuracy(predictions, labels),
            "macro_f1": metrics.f1(predictions, labels),
        }

    @torch.no_grad()
    def probabilities(
        self, model: torch.nn.Module, records: Sequence[Record], *, batch_size: int = 32
    ) -> Tensor:
        """(records, labels) float32: how probable each class is, for records without labels.

        Args:
            model: in eval mode, ours or transformers'.
            records: at least one.
            batch_size: how many the model reads at once.

        Raises:
            ValueError: a record does not fit.
        """
        device = next(model.parameters()).device
        rows = []
        for first in range(0, len(records), batch_size):
            examples = [self.inputs(record) for record in records[first : first + batch_size]]
            batch = sequences.batch_of(examples, self.tokenizer, {}, 0).to(device)
            rows.append(model(**batch.arguments).logits.float().softmax(-1).cpu())
        return torch.cat(rows)
