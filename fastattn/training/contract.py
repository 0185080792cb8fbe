"""The words that the rooms share: an example, a batch, an objective, batches by their number.

    record       what a source has: a line of JSON, a row of a table, {"text": ...}
    example      what an objective makes of it, once: named arrays of token ids, kept in files
    batch        arguments of the model, of some examples, made again in each epoch (masks drawn)

Nothing here has a state: batch k of a run follows from the run's seed and k, so that a run which is
killed goes on with the batch that it would have had.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy
import torch
from torch import Tensor

from fastattn.training.evaluation.metrics import perplexity
from fastattn.training.tokenizer import Tokenizer

Record = Mapping[str, Any]
Example = Mapping[str, numpy.ndarray]  # one-dimensional integer arrays by name
Interface = Literal["fastattn", "transformers"]  # whose names the model's arguments have


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a model, and how much of it counts.

    Attributes:
        arguments: of the model's forward, by name: tensors on the CPU, tuples of them, numbers.
        counted: how many targets count in the loss, which is their mean.
        tokens: how many tokens the model reads, padding not counted.
        examples: of which it is made, where `Objective.measure` wants what the model is not given.
    """

    arguments: Mapping[str, Any]
    counted: int
    tokens: int
    examples: Sequence[Example] = ()

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        moved = {name: _moved(value, device) for name, value in self.arguments.items()}
        return dataclasses.replace(self, arguments=moved)


class Objective(abc.ABC):
    """A task for a model, from a record of data to the loss: one file each in `objectives/`.

    Attributes:
        name: as a config has it.
        settings_class: a frozen dataclass; each field is described in its docstring, which
            `fastattn train --help` prints.
        fields: the arrays that an example has. The first one's length is the example's.
        packs: whether examples may be cut and joined to rows of a given number of tokens
            (`data.Packed`); else a batch is of whole examples (`data.Shuffled`).
        model_class, auto_class: the class of `fastattn.models` that it trains, and the one of
            transformers by which it reads a model of theirs.
        roles, extra_tokens: the special tokens that a tokenizer needs beside the end of text, by
            role, and others that are never cut: one that is trained for the objective has them.
        of_text: whether the targets are the tokens of a text: then the perplexity is measured too.
        truncated: how many texts `encode` has cut so far, to a length that a setting gives.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type]
    fields: ClassVar[tuple[str, ...]]
    packs: ClassVar[bool] = False
    model_class: ClassVar[str] = "GPT"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    roles: ClassVar[tuple[str, ...]] = ()
    extra_tokens: ClassVar[tuple[str, ...]] = ()
    of_text: ClassVar[bool] = False

    def __init__(
        self, tokenizer: Tokenizer, settings: Any = None, interface: Interface = "fastattn"
    ) -> None:
        """
        Args:
            settings: of `settings_class`; None: its defaults.

        Raises:
            ValueError: the tokenizer lacks a token, or the settings do not fit it.
        """
        self.tokenizer = tokenizer
        self.settings = self.settings_class() if settings is None else settings
        self.interface = interface
        self.truncated = 0
        self._derive()

    def _derive(self) -> None:  # noqa: B027  # most objectives have nothing to derive
        """Set what follows from tokenizer and settings."""

    @abc.abstractmethod
    def encode(self, record: Record) -> Iterable[Example]:
        """The examples of a record, none, one or several; called once, when the data are prepared.

        Raises ValueError for a record that does not fit; the message names the field.
        """

    @abc.abstractmethod
    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        """One batch of examples; whatever is drawn comes from `random`."""

    def fingerprint(self) -> dict[str, Any]:
        """The settings on which `encode` depends, as JSON: examples made by others are not
        read."""
        return {"name": self.name, **dataclasses.asdict(self.settings)}

    @staticmethod
    def value(record: Record, field: str) -> Any:
        """The value in a record's field.

        Raises:
            ValueError: the record has no such field.
        """
        if field not in record:
            raise ValueError(
                f"a record has no field {field!r}; fields: {', '.join(map(str, record)) or 'none'}"
            )
        return record[field]

    @classmethod
    def text(cls, record: Record, field: str) -> str:
        """The text in a record's field.

        Raises:
            ValueError: the record has no such field, or no text there.
        """
        text = cls.value(record, field)
        if not isinstance(text, str):
            raise ValueError(
                f"the field {field!r} of a record must be a text, got {type(text).__name__}"
            )
        return text

    def cut(self, ids: Sequence[int], length: int, setting: str) -> list[int]:
        """The first `length` of `ids`; what is lost is counted, and a warning says it once."""
        if len(ids) > length:
            if not self.truncated:
                warnings.warn(
                    f"a text of {len(ids)} tokens is cut to {length}, for which the setting "
                    f"{setting} has room; others after it are cut without a warning, but counted",
                    stacklevel=2,
                )
            self.truncated += 1
        return list(ids[:length])

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The mean over the targets that count, with a gradient."""
        return loss_of(model(**batch.arguments))

    def measure(self, model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The figures of an evaluation: "loss", the mean over all targets, and others by name.

        `model` is in eval mode and without gradients, the batches on its device.
        """
        return self.conclude(self.observe(model, batch) for batch in batches)

    def observe(self, model: torch.nn.Module, batch: Batch) -> Any:
        """What `conclude` needs of a batch, which another process may have read: no tensors.

        It calls the model once, whatever the batch: processes may share its weights.
        """
        loss = self.loss(model, batch).item()
        return (loss if batch.counted else 0.0), batch.counted

    def conclude(self, observed: Iterable[Any]) -> dict[str, float]:
        """`measure` of batches that were observed, in their order."""
        total, counted = 0.0, 0
        for loss, targets in observed:
            total += loss * targets
            counted += targets
        if not counted:
            raise ValueError("the validation data have no target that counts in the loss")
        loss = total / counted
        return {"loss": loss, "perplexity": perplexity(loss, 1)} if self.of_text else {"loss": loss}


class Batches(Protocol):
    """Batches by their number, without end: a pure function of it."""

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted from 0."""
        ...

    def once(self, first: int = 0, step: int = 1) -> Iterable[Batch]:
        """Each example once, in the order of the data: for an evaluation; the last may be smaller.

        Of these batches those of the numbers `first`, `first + step`, and so on.
        """
        ...


def loss_of(output: Any) -> Tensor:
    """The loss in what a model returned: its attribute `loss`, or the last of a pair.

    Raises:
        TypeError: there is none.
    """
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and len(output) == 2:
        loss = output[1]
    if not isinstance(loss, Tensor):
        raise TypeError(
            "the model must return something with a loss, or the pair (logits, loss), got "
            f"{type(output).__name__}: wrap it in a module that does"
        )
    return loss


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        moved = (_moved(part, device) for part in value)
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
