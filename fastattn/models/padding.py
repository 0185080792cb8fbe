"""Attention masks of padded batches: what is accepted, and how padding is left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn import PackedSequences
from fastattn.ops.common import modes


class Padding(NamedTuple):
    """Which positions of a padded batch count.

    Attributes:
        visible: (B, T) boolean, True where a token counts.
        mask: (B, 1, 1, T), `fastattn.attention`'s; None where the lengths say all.
        key_lengths: (B,) int64, `fastattn.attention`'s: a sequence's last visible position plus 1.
        packed: the visible tokens as sequences in one row; None where looking would wait, or
            padding is not only at the end.
    """

    visible: Tensor
    mask: Tensor | None
    key_lengths: Tensor
    packed: PackedSequences | None = None

    def pack(self, x: Tensor) -> Tensor:
        """The visible elements in one row: (B or 1, T, ...) -> (1, tokens, ...)."""
        return x.expand(len(self.visible), *x.shape[1:])[self.visible].unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """The reverse, with 0 where there is padding: (1, tokens, C) -> (B, T, C)."""
        whole = x.new_zeros(*self.visible.shape, x.shape[-1])
        whole[self.visible] = x.squeeze(0)
        return whole


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
            starts = F.pad(key_lengths.cumsum(0), (1, 0))
            longest = int(key_lengths.max())
            packed = PackedSequences(starts, longest) if longest else None
            return Padding(visible, None, key_lengths, packed)
    return Padding(visible, visible[:, None, None], key_lengths)
