"""Attention masks of padded batches: what is accepted, and what attention is told."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.common import modes


class Padding(NamedTuple):
    """Which positions of a padded batch count.

    Attributes:
        visible: (B, T) boolean, True where a token counts.
        mask: (B, 1, 1, T), `fastattn.attention`'s; None where the lengths say all.
        key_lengths: (B,) int64, `fastattn.attention`'s: a sequence's last visible position plus 1.
    """

    visible: Tensor
    mask: Tensor | None
    key_lengths: Tensor


def read_mask(attention_mask: Tensor | None, ids: Tensor) -> Padding | None:
    """An attention mask (B, T) of the tokens ``ids``, 0 or False where there is padding.

    None where nothing is hidden, which only a CPU's mask tells: looking at a GPU's would make the
    host wait. Raises TypeError or ValueError for another dtype or shape.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a torch.Tensor or None, got {type(attention_mask).__name__}"
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask must be boolean or integers, got {attention_mask.dtype}")
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    visible = attention_mask.bool()
    ends = torch.arange(1, ids.shape[1] + 1, device=visible.device)
    key_lengths = (visible * ends).amax(1)
    if visible.is_cpu and modes.readable(visible):
        hidden = ~visible
        if not hidden.any():
            return None
        if torch.equal(hidden.sum(1), ids.shape[1] - key_lengths):  # all of it at the end
            return Padding(visible, None, key_lengths)
    return Padding(visible, visible[:, None, None], key_lengths)
