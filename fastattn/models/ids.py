"""Token ids and padding masks: what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.common import modes


def check_ids(
    name: str,
    ids: Tensor,
    vocab_size: int,
    ignored: int | None = None,
    of: str = "vocab_size",
) -> None:
    """Raise unless ``ids`` are token ids (B, T), or ``ignored``; only a CPU's values are read.

    They may be other numbers below ``vocab_size``; ``of`` is the name of the bound then.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, which no model here takes: pad it with "
            "torch.nested.to_padded_tensor; generate takes lists of token ids of any lengths"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64 token ids, got {ids.dtype}")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"{name} must have the shape (batch, seqlen), neither of them 0, got {tuple(ids.shape)}"
        )
    if ids.is_cpu and modes.readable(ids):
        values = ids if ignored is None else ids.masked_fill(ids == ignored, 0)
        low, high = (value.item() for value in values.aminmax())
        if low < 0 or high >= vocab_size:
            but = "" if ignored is None else f" or {ignored}"
            raise ValueError(
                f"{name} must be from 0 to {of} - 1 = {vocab_size - 1}{but}, "
                f"got {low if low < 0 else high}"
            )


def padding_mask(name: str, mask: Tensor | None, of: Tensor | None) -> Tensor | None:
    """A padding mask (B, T) as `fastattn.attention`'s mask of keys; ValueError for other shapes."""
    if mask is None or of is None:
        return None
    if mask.shape != of.shape[:2]:
        raise ValueError(
            f"{name} must have the shape (batch, seqlen) of its tokens, {tuple(of.shape[:2])}, got "
            f"{tuple(mask.shape)}"
        )
    return mask.bool()[:, None, None, :]
