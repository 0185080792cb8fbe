"""flash-attn 2.8's padding helpers: between padded batches and the packed tokens of varlen calls.

All are plain PyTorch and differentiable, any number of times. Where an index repeats, gradients
add up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """input[indices]: the rows `indices`, (n,), of input, (rows, ...), as (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(
    values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int
) -> torch.Tensor:
    """(first_axis_dim, ...): values, (n, ...), in the rows `indices`, and zeros elsewhere.

    As in output[indices] = values, indices are (n,) integers, negative ones counted from the end,
    or (first_axis_dim,) booleans of which n are True.
    """
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_put((indices,), values)


def index_first_axis_residual(
    input: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair (input[indices], input), as a residual connection needs it."""
    return index_first_axis(input, indices), input


def unpad_input(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    unused_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Drop the padding of a batch.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integer: not 0 where there is a token.
        unused_mask: (batch, seqlen), not 0 at places that are kept though they hold no token.

    Returns:
        hidden_states: (total, ...), the places that either mask keeps.
        indices: (total,), int64, where they stood in the flattened (batch * seqlen).
        cu_seqlens: (batch + 1,), int32, where each sequence begins in `total`.
        max_seqlen_in_batch: int, the longest of them. Reading it waits for the device.
        seqused: (batch,), int32, how many tokens `attention_mask` has in each sequence.
    """
    tokens = attention_mask != 0
    kept = tokens if unused_mask is None else tokens | (unused_mask != 0)
    indices = kept.flatten().nonzero().flatten()
    lengths = kept.sum(-1, dtype=torch.int32)
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        _cumulative(lengths),
        int(lengths.max()),
        tokens.sum(-1, dtype=torch.int32),
    )


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Drop the padding of a batch whose rows hold several samples, one after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), integer: the lengths of the samples of each row,
            in their order, and 0 elsewhere. (2, 3, 0, 0, 0, 0) is a row of 6 places that holds a
            sample of 2 tokens, one of 3, and a place of padding.

    Returns:
        hidden_states: (total, ...), the tokens of all samples.
        indices: (total,), int64, where they stood in the flattened (batch * seqlen).
        cu_seqlens: (samples + 1,), int32, where each sample begins in `total`.
        max_seqlen_in_batch: int, the longest sample. Reading it waits for the device.
    """
    lengths = attention_mask_in_length[attention_mask_in_length != 0].to(torch.int32)
    places = torch.arange(attention_mask_in_length.shape[1], device=lengths.device)
    kept = places < attention_mask_in_length.sum(-1, keepdim=True)
    indices = kept.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        _cumulative(lengths),
        int(lengths.max()),
    )


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """Undo `unpad_input`: (total, ...) back to (batch, seqlen, ...), with zeros for the padding.

    `indices` as in `index_put_first_axis`, of the flattened (batch * seqlen).
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """(n,) lengths as the (n + 1,) ends of the sequences, from 0 on."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
