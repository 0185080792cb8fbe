"""Arrays of examples to the tensors of a batch: joined to one row, or padded to a rectangle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn import PackedSequences
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Interface
from fastattn.training.tokenizer import Tokenizer


def packed_batch(
    ids: Sequence[numpy.ndarray], labels: Sequence[numpy.ndarray], interface: Interface
) -> Batch:
    """Sequences in one row, without padding, for a causal model that sees each by itself.

    Args:
        ids: of each sequence its tokens (n,), at least one.
        labels: of each the same tokens, -100 where one does not count. The first of a sequence
            never counts: nothing is before it.
        interface: "fastattn": the arguments of `models.GPT`, which keeps no logits;
            "transformers": those of its causal models, as DataCollatorWithFlattening makes them.
    """
    lengths = [len(sequence) for sequence in ids]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    row = torch.from_numpy(numpy.concatenate(ids).astype(numpy.int64)).unsqueeze(0)  # (1, N)
    counting = torch.from_numpy(numpy.concatenate(labels).astype(numpy.int64)).unsqueeze(0)
    counting[:, starts[:-1].long()] = IGNORED
    longest = max(lengths)
    arguments: dict[str, Any] = {"input_ids": row}
    if interface == "fastattn":
        arguments["targets"] = F.pad(counting[:, 1:], (0, 1), value=IGNORED)
        arguments |= {"packed": PackedSequences(starts, longest), "keep_logits": False}
    else:  # the model shifts by itself
        places = numpy.concatenate([numpy.arange(length) for length in lengths])
        arguments |= {"labels": counting, "position_ids": torch.from_numpy(places).unsqueeze(0)}
        arguments |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
        # With a cache transformers makes masks in which the sequences of a row see each other.
        arguments["use_cache"] = False
    return Batch(arguments, int((counting != IGNORED).sum()), row.numel())


def padded(rows: Sequence[numpy.ndarray], value: int) -> Tensor:
    """(B, T) int64: `rows` side by side, followed by `value` up to the length of the longest."""
    out = torch.full((len(rows), max(map(len, rows))), value)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.from_numpy(values.astype(numpy.int64))
    return out


def encoder_decoder_batch(
    sources: Sequence[numpy.ndarray],
    targets: Sequence[numpy.ndarray],
    tokenizer: Tokenizer,
    interface: Interface,
) -> Batch:
    """Pairs for a model that reads one sequence and writes another.

    The model makes the decoder's input of the targets, by shifting them one place to the right.
    """
    arguments: dict[str, Any] = {**padded_inputs(sources, tokenizer)}
    labels = padded(targets, IGNORED)
    if interface == "fastattn":
        arguments |= {"targets": labels, "keep_logits": False}
    else:
        arguments["labels"] = labels
    counted = sum(map(len, targets))
    return Batch(arguments, counted, counted + sum(map(len, sources)))


def padded_inputs(rows: Sequence[numpy.ndarray], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """`input_ids` (B, T), and where rows differ in length the `attention_mask` that hides the rest.

    The rest is the tokenizer's padding token, or token 0 if it has none.
    """
    inputs = {"input_ids": padded(rows, tokenizer.token("pad") if "pad" in tokenizer.roles else 0)}
    lengths = torch.tensor([len(row) for row in rows])
    width = inputs["input_ids"].shape[1]
    if (lengths < width).any():
        inputs["attention_mask"] = (torch.arange(width) < lengths.unsqueeze(1)).long()
    return inputs
