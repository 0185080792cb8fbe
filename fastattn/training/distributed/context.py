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

from fastattn.nn import PackedSequences, SequencePart
from fastattn.ops.attention import zigzag
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ARGUMENTS = {"input_ids", "targets", "packed", "keep_logits"}


def part_of(batch: Batch, group: ProcessGroup, rank: int, size: int) -> Batch:
    """The part of a causal batch that process `rank` of the `size` processes of `group` reads.

    A packed row is padded at its end to a multiple of 2 * size tokens, by a sequence of its own, in
    which no target counts.

    Args:
        batch: of `models.GPT`, as the objectives causal and chat make it: input_ids and targets of
            one shape (B, T), with or without packed and keep_logits.

    Returns:
        A batch whose `counted` and `tokens` are those of the part. Where no target counts, counted
        is 0, and the arguments have one target all the same, so that the loss is a number, which
        the weight counted makes 0.

    Raises:
        ValueError: the batch has other arguments, or rows that are not packed and do not divide.
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
    if length > tokens:
        if arguments.get("packed") is None:
            raise ValueError(
                f"rows of {tokens} tokens do not divide into two pieces for each of {size} "
                f"processes: set training.context to a multiple of {2 * size}"
            )
        starts, longest = arguments["packed"]
        arguments["packed"] = PackedSequences(
            F.pad(starts, (0, 1), value=length), max(longest, length - tokens)
        )
    places = zigzag.places(rank, size, length, ids.device)
    arguments["input_ids"] = F.pad(ids, (0, length - tokens))[:, places]
    arguments["targets"] = F.pad(targets, (0, length - tokens), value=IGNORED)[:, places]
    arguments["part"] = SequencePart(group, length)
    counted = int((arguments["targets"] != IGNORED).sum())
    if not counted:
        arguments["targets"][0, 0] = 0
    read = len(ids) * int((places < tokens).sum())
    return dataclasses.replace(batch, arguments=arguments, counted=counted, tokens=read)
