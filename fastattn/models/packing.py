"""Sequences that lie one after another in one row: what is accepted, and their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.nn import PackedSequences
from fastattn.ops.common import modes


def check_packed(packed: PackedSequences, input_ids: Tensor, tokens: int, n_positions: int) -> None:
    """Raise unless ``packed`` describes the row of so many ``tokens`` that ``input_ids`` (1, N) is,
    or is a part of; only a CPU's are read.
    """
    if not isinstance(packed, PackedSequences):
        raise TypeError(
            "packed must be a fastattn.nn.PackedSequences(cu_seqlens, max_seqlen), got "
            f"{type(packed).__name__}"
        )
    starts, longest = packed
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        given = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"cu_seqlens of packed must be an int32 or int64 tensor, got {given}")
    if starts.dim() != 1 or len(starts) < 2:
        raise ValueError(
            f"cu_seqlens of packed must have the shape (sequences + 1,), got {tuple(starts.shape)}"
        )
    if len(input_ids) != 1:
        raise ValueError(
            "packed sequences lie in one row, so that input_ids must have the shape (1, tokens), "
            f"got {tuple(input_ids.shape)}"
        )
    if longest > n_positions:
        raise ValueError(
            f"a packed sequence must have at most n_positions = {n_positions} tokens, got "
            f"max_seqlen = {longest}"
        )
    if not (starts.is_cpu and modes.readable(starts)):  # elsewhere looking would make the host wait
        return
    ends = int(starts[0]), int(starts[-1])
    if ends != (0, tokens):
        row = "input_ids" if tokens == input_ids.shape[1] else "the whole row"
        raise ValueError(
            f"cu_seqlens of packed must go from 0 to the {tokens} tokens of {row}, "
            f"got {ends[0]} to {ends[1]}"
        )
    low, high = (int(length) for length in starts.diff().aminmax())
    if low < 0 or high > longest:
        raise ValueError(
            f"the sequences of packed must have 0 to max_seqlen = {longest} tokens, got one of "
            f"{low if low < 0 else high}"
        )


def packed_positions(starts: Tensor, tokens: int) -> Tensor:
    """The place of each of ``tokens`` tokens in its own sequence: (tokens,), int64.

    >>> packed_positions(torch.tensor([0, 3, 3, 5]), 5)
    tensor([0, 1, 2, 0, 1])
    """
    places = torch.arange(tokens, device=starts.device)
    return places - starts[torch.bucketize(places, starts[1:], right=True)]


def packed_lengths(starts: Tensor, tokens: int) -> Tensor:
    """The length of each of ``tokens`` tokens' own sequence: (tokens,).

    >>> packed_lengths(torch.tensor([0, 3, 3, 5]), 5)
    tensor([3, 3, 3, 2, 2])
    """
    places = torch.arange(tokens, device=starts.device)
    return starts.diff()[torch.bucketize(places, starts[1:], right=True)]
