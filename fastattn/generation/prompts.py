"""Prompts and special tokens of `generate`, checked and in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.generation.config import GenerationConfig


def read_prompts(
    config: Any, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
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
        rows = _unpadded(
            rows, input_ids, attention_mask, getattr(config, "is_encoder_decoder", False)
        )
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


def _unpadded(
    rows: list[list[int]], input_ids: Tensor, mask: Tensor, right_too: bool
) -> list[list[int]]:
    """The rows without what ``mask`` hides, which must be before all that it shows, or after."""
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
    lengths = mask.int().sum(1)
    if right_too:
        blocks = (mask.int().diff(dim=1) > 0).sum(1) + mask[:, 0]
        if (blocks != 1).any():
            raise ValueError(
                "attention_mask must hide padding before or after the tokens, and not all of a row"
            )
    elif (mask.int().diff(dim=1) < 0).any() or not mask[:, -1].all():
        raise ValueError(
            "attention_mask must hide only padding on the left, and no prompt's last token: "
            "pad with padding_side='left', or give lists"
        )
    starts = mask.int().argmax(1)
    return [
        row[start : start + length]
        for row, start, length in zip(rows, starts.tolist(), lengths.tolist(), strict=True)
    ]


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T) of lists of token ids, with 0 after them; any id does: nothing that counts sees it."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def special_tokens(
    config: Any,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    chosen: GenerationConfig | None = None,
) -> tuple[list[int], int]:
    """The tokens that end a sequence, and the padding: `generate`'s arguments, else those of the
    generation config ``chosen``, else the model's config's.

    Arguments must be tokens. What a config names outside of the vocabulary cannot come up and is
    left out.
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
    chosen = chosen or GenerationConfig()
    said = _first(eos_token_id, chosen.eos_token_id, config.eos_token_id)
    ends = [token for token in _several(said) if 0 <= token < config.vocab_size]
    pad = _first(pad_token_id, chosen.pad_token_id, config.pad_token_id)
    if pad is None or not 0 <= pad < config.vocab_size:
        pad = ends[0] if ends else 0
    return ends, pad


def start_token(config: Any, chosen: GenerationConfig) -> int:
    """The first token of an encoder-decoder's decoder; ValueError if nothing says it."""
    configs = getattr(config, "decoder_start_token_id", None)
    token = _first(chosen.decoder_start_token_id, configs, chosen.bos_token_id, config.bos_token_id)
    if token is None:
        raise ValueError(
            "an encoder-decoder needs decoder_start_token_id: neither the call nor the model's "
            "config says it"
        )
    if not 0 <= token < config.vocab_size:
        raise ValueError(
            f"decoder_start_token_id must be from 0 to vocab_size - 1 = {config.vocab_size - 1}, "
            f"got {token}"
        )
    return int(token)


def _first(*said: Any) -> Any:
    """The first that is not None."""
    return next((one for one in said if one is not None), None)


def _several(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, Sequence) else [tokens]
