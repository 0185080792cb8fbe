"""Parts of the objectives with labels: special tokens around texts, labels by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from torch import Tensor

from fastattn.training.contract import Batch, Example
from fastattn.training.objectives.collation import padded, padded_inputs
from fastattn.training.tokenizer import Layout, Tokenizer


def room(layout: Layout, context: int) -> int:
    """How many tokens of texts an example of `context` tokens has beside the special ones.

    Raises:
        ValueError: none.
    """
    special = len(layout.before) + len(layout.between) + len(layout.after)
    if context <= special:
        raise ValueError(
            f"context must be more than the {special} special tokens of an example, got {context}"
        )
    return context - special


def fitting(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept in `room`: the longer one loses first."""
    kept = min(first, max(room - second, (room + 1) // 2))
    return kept, min(second, room - kept)


def joined(layout: Layout, texts: Sequence[Sequence[int]]) -> dict[str, numpy.ndarray]:
    """One or two texts' tokens and the special ones around them: "input_ids", "token_type_ids"."""
    rows = [layout.before]
    for number, ids in enumerate(texts):
        rows.append(layout.between if number else layout.before[:0])
        rows.append(numpy.stack([ids, numpy.full(len(ids), layout.types[number])], axis=1))
    rows.append(layout.after)
    whole = numpy.concatenate(rows).astype(numpy.int64)
    return {"input_ids": whole[:, 0], "token_type_ids": whole[:, 1]}


def batch_of(
    examples: Sequence[Example], tokenizer: Tokenizer, targets: dict[str, Tensor], counted: int
) -> Batch:
    """A batch of what `joined` has made: arguments of our encoders and of transformers'.

    Types of segments are left out where all are 0, since not every model has them.
    """
    rows = [example["input_ids"] for example in examples]
    arguments = padded_inputs(rows, tokenizer)
    types = padded([example["token_type_ids"] for example in examples], 0)
    if types.any():
        arguments["token_type_ids"] = types
    return Batch(arguments | targets, counted, sum(map(len, rows)), tuple(examples))


def number_of(label: object, labels: Sequence[str], field: str) -> int:
    """The number of a record's label, which is given by name or by number.

    Raises:
        ValueError: it is neither; the message has it, and those that are accepted.
    """
    if isinstance(label, str) and label in labels:
        return list(labels).index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    raise ValueError(
        f"the field {field!r} of a record must be one of {', '.join(map(repr, labels))}, or its "
        f"number from 0 to {len(labels) - 1}; got {label!r}"
    )


def check_labels(labels: object) -> tuple[str, ...]:
    """The names of classes, at least two different ones; ValueError or TypeError if not."""
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f"labels must be a list of names, got {labels!r}")
    if not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels must be names, got {list(labels)!r}")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(
            "labels must list the classes by name, at least two and each once, in the order of "
            f'their numbers, as ["negative", "positive"]; got {list(labels)!r}'
        )
    return tuple(labels)
