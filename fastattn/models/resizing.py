"""Another number of tokens in a model's vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
) -> torch.nn.Embedding:
    """Give the token embedding, and the head, ``new_num_tokens`` rows; returns the embedding.

    The first rows stay as they are; new ones are the mean of the old ones (Hewitt 2021), as
    transformers has it but for its noise of 1e-5 standard deviations; BART's bias of the logits
    gets zeros. The weights become new parameters, so an optimiser has to be made afterwards; a tied
    head stays tied.

    Args:
        new_num_tokens: the new ``config.vocab_size``; None keeps the old one.
        pad_to_multiple_of: round the number up to a multiple of it.

    Raises:
        TypeError, ValueError: a number is not a positive integer.
    """
    count = model.config.vocab_size if new_num_tokens is None else new_num_tokens
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    for name, number in (("new_num_tokens", count), ("pad_to_multiple_of", multiple)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an integer or None, got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    count = -(-count // multiple) * multiple
    embedding: torch.nn.Embedding = model.wte if hasattr(model, "wte") else model.embedding
    if count == model.config.vocab_size:
        return embedding
    model.config = dataclasses.replace(model.config, vocab_size=count)
    head = model.lm_head
    tied = head.weight is embedding.weight
    embedding.weight = _resized(embedding.weight, count)
    head.weight = embedding.weight if tied else _resized(head.weight, count)
    embedding.num_embeddings = head.out_features = count
    if head.bias is not None:
        head.bias = _resized(head.bias, count)
    if (bias := getattr(head, "logits_bias", None)) is not None:
        resized = F.pad(bias.detach(), (0, count - bias.shape[1]))  # cut if that is negative
        head.logits_bias = torch.nn.Parameter(resized, requires_grad=bias.requires_grad)
    return embedding


def _resized(weight: Tensor, count: int) -> torch.nn.Parameter:
    with torch.no_grad():
        rows = weight[:count]
        if count > len(rows):
            mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
            rows = torch.cat([rows, mean.expand(count - len(rows), *weight.shape[1:])])
        return torch.nn.Parameter(rows.clone(), requires_grad=weight.requires_grad)
