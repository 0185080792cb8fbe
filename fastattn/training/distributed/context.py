"""Context parallelism: one batch, of which each process of a group reads its part.

The processes of a context group read the same batch, and each calls the model with its part of the
rows (`nn.SequencePart`). The one-process loss is the sum over the group of

    loss of the part * (targets that count in the part / targets that count in the batch)

and its gradients are the sums of the gradients of these. A process whose part counts nothing calls
the model like the others, for they wait for its keys and values.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from fastattn.nn import PackedSequences, SequencePart
from fastattn.ops.attention import zigzag
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ARGUMENTS = {"input_ids", "targets", "packed", "keep_logits"}


def part_of(batch: Batch, group: ProcessGroup, rank: int, size: int) -> Batch:
    """The part of a causal batch that process `rank` of the `size` processes of `group` reads.

    Rows are padded at their end to a multiple of 2 * size tokens, in a packed row by a sequence of
    its own. No target counts there.

    Args:
        batch: of `models.GPT`, as the objectives causal and chat make it: input_ids and targets of
            one shape (B, T), with or without packed and keep_logits.

    Returns:
        A batch whose `counted` and `tokens` are those of the part. Where no target counts, counted
        is 0, and the arguments have one target all the same, so that the loss is a number, which
        the weight counted makes 0.

    Raises:
        ValueError: the batch has other arguments.
    """
    names = set(batch.arguments)
    if not {"input_ids", "targets"} <= names <= ARGUMENTS:
        raise ValueError(
            "context parallelism is for fastattn's GPT with the objectives causal and chat, whose "
            f"batches have the arguments {', '.join(sorted(ARGUMENTS))}; this one has "
            f"{', '.join(sorted(names))}: set [distributed] context = 1"
        )
    arguments: dict[str, Any] = dict(batch.arguments)
    ids, targets = arguments["input_ids"], arguments["targets"]
    tokens = ids.shape[1]
    length = tokens + -tokens % (2 * size)
    places = zigzag.places(rank, size, length, ids.device)
    arguments["input_ids"] = _padded(ids, length, 0)[:, places]
    arguments["targets"] = _padded(targets, length, IGNORED)[:, places]
    packed = arguments.get("packed")
    if packed is not None and length > tokens:
        starts, longest = packed
        arguments["packed"] = PackedSequences(
            F.pad(starts, (0, 1), value=length), max(longest, length - tokens)
        )
    arguments["part"] = SequencePart(group, length)
    counted = int((arguments["targets"] != IGNORED).sum())
    if not counted:
        arguments["targets"][0, 0] = 0
    read = len(ids) * int((places < tokens).sum())
    return dataclasses.replace(batch, arguments=arguments, counted=counted, tokens=read)


def _padded(rows: Tensor, length: int, value: int) -> Tensor:
    return F.pad(rows, (0, length - rows.shape[1]), value=value)
