"""Rows of tokens of which a process has a part: what is accepted."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastattn.nn import SequencePart


def check_part(part: SequencePart, input_ids: Tensor) -> None:
    """Raise unless ``input_ids`` (B, n) can be this process's part of rows of part.length."""
    if not isinstance(part, SequencePart):
        raise TypeError(
            f"part must be a fastattn.nn.SequencePart(group, length), got {type(part).__name__}"
        )
    group, length = part
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "group of part must be a torch.distributed.ProcessGroup that this process belongs to, "
            f"got {type(group).__name__}"
        )
    size = dist.get_world_size(group)
    if isinstance(length, bool) or not isinstance(length, int) or length % (2 * size):
        raise ValueError(
            f"length of part must be a multiple of {2 * size}, two pieces for each of {size} "
            f"processes, got {length!r}: pad the rows"
        )
    if input_ids.shape[1] * size != length:
        raise ValueError(
            f"input_ids must have {length // size} tokens a row, a process's part of {length} on "
            f"{size} processes, got {input_ids.shape[1]}"
        )
