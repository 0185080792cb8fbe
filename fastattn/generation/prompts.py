"""Prompts and special tokens of `generate`, checked and in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.models.config import GPTConfig


def read_prompts(
    config: GPTConfig, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
) -> list[list[int]]:
    """The tokens of each prompt, without padding; arguments and errors are `generate`'s."""
    vocab_size = config.vocab_size
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise ValueError(
                "attention_mask goes with a tensor of input_ids; lists have no padding"
            )
        return _listed(input_ids, vocab_size)
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64 token ids, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            "input_ids must have the shape (batch, seqlen), neither of them 0, "
            f"got {tuple(input_ids.shape)}"
        )
    rows = input_ids.tolist()
    if attention_mask is not None:
        rows = _unpadded(rows, input_ids, attention_mask)
    return _listed(rows, vocab_size)


def _listed(rows: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    if not isinstance(rows, Sequence):
        raise TypeError(
            "input_ids must be a tensor (batch, seqlen) or a list of lists of token ids, "
            f"got {type(rows).__name__}"
        )
    if not rows:
        raise ValueError("input_ids must have at least one prompt, got none")
    prompts = []
    for index, row in enumerate(rows):
        if not isinstance(row, Sequence) or not all(type(token) is int for token in row):
            raise TypeError(
                f"each prompt of input_ids must be a list of integers, got {row!r} at {index}"
            )
        if not row:
            raise ValueError(f"each prompt of input_ids must have a token, got none at {index}")
        if min(row) < 0 or max(row) >= vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(
                f"input_ids must be from 0 to vocab_size - 1 = {vocab_size - 1}, got {wrong} in "
                f"prompt {index}"
            )
        prompts.append(list(row))
    return prompts


def _unpadded(rows: list[list[int]], input_ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows without what ``mask`` hides, which must be before all that it shows."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.to("cpu")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask must be 1 for tokens and 0 for padding")
    if (mask.int().diff(dim=1) < 0).any() or not mask[:, -1].all():
        raise ValueError(
            "attention_mask must hide padding on the left alone, and no prompt's last token: "
            "pad with padding_side='left', or give lists"
        )
    return [row[-length:] for row, length in zip(rows, mask.int().sum(1).tolist(), strict=True)]


def special_tokens(
    config: GPTConfig, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[list[int], int]:
    """The tokens that end a sequence, and the padding: `generate`'s arguments, else the config's.

    What the config names outside of the vocabulary cannot come up and is left out.
    """
    for name, given in (("eos_token_id", eos_token_id), ("pad_token_id", pad_token_id)):
        for token in _several(given):
            if type(token) is not int:
                raise TypeError(f"{name} must be a token id, got {given!r}")
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} must be from 0 to vocab_size - 1 = {config.vocab_size - 1}, "
                    f"got {given!r}"
                )
    ends = _several(config.eos_token_id if eos_token_id is None else eos_token_id)
    ends = [token for token in ends if 0 <= token < config.vocab_size]
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    if pad is None or not 0 <= pad < config.vocab_size:
        pad = ends[0] if ends else 0
    return ends, pad


def _several(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, Sequence) else [tokens]
