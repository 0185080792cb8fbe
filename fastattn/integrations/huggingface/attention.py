"""`fastattn.attention` behind transformers' AttentionInterface.

transformers calls an attention implementation with q, k, v as (batch, heads, seqlen, head_dim) and
a mask made by the mask function of the same name, and expects (batch, seqlen, heads, head_dim).
fastattn's own layout is the latter; both ways are transposed views, nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fastattn.ops.attention import attention

try:  # younger than transformers 5.0, and not public
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

NAME = "fastattn"

# Arguments of other implementations that change the result. (`sliding_window`, `cu_seq_lens_*` and
# `is_causal` are looked at one by one; what is left changes nothing: `position_ids`, `use_cache`,
# `deterministic`, `max_length_*`.)
_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "an additive bias",
    "head_mask": "a mask of heads",
    "indices": "sparse attention by indices",
    "block_indices": "sparse attention by blocks",
    "cache": "a paged cache (continuous batching)",
}


def register() -> None:
    """Make `attn_implementation="fastattn"` known to transformers. Harmless if repeated."""
    AttentionInterface.register(NAME, attention_forward)
    # Boolean, or None where the module's own causality says it all; the mask has padding, packed
    # sequences, sliding windows and static caches in it.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for a module of transformers, with the conventions of its "sdpa".

    Without a mask, more than one query and `is_causal` (default: the module's, else True), query i
    sees the keys j <= i; a longer key is the empty rest of a static cache. With a mask, the mask
    alone decides. A query that sees no key gives 0.

    Args:
        query: (batch, heads, seqlen_q, head_dim).
        key, value: (batch, kv_heads, seqlen_k, head_dim); kv_heads divides heads.
        attention_mask: boolean, broadcastable to (batch, heads, seqlen_q, seqlen_k), True where a
            key may be seen.
        dropout: probability with which an attention weight is dropped.
        scaling: factor of the scores, default 1 / sqrt(head_dim).
        kwargs: whatever else the module passes; arguments that would change the result and are not
            supported (soft-capping, sinks, biases) must be None.

    Returns:
        The output (batch, seqlen_q, heads, head_dim), and None for the attention weights, which
        are never formed.

    Raises:
        ValueError: an argument that cannot be honoured; the message names it and the mend.
    """
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    _check(attention_mask, seqlen_k, query.shape[0], kwargs)
    # The length comes first, so that torch.compile sees a bool and not a symbol.
    causal = seqlen_q > 1 and attention_mask is None and is_causal
    if causal and seqlen_k != seqlen_q:
        if seqlen_k < seqlen_q:
            raise ValueError(
                f"key has {seqlen_k} positions, query {seqlen_q}: which keys a query may see is "
                "not defined without an attention_mask"
            )
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal,
        softmax_scale=scaling,
        mask=attention_mask,
        dropout_p=dropout,
    )
    assert isinstance(out, torch.Tensor)
    return out, None


def _check(
    attention_mask: torch.Tensor | None, seqlen_k: int, batch: int, kwargs: dict[str, Any]
) -> None:
    """Raise for what would change the result and is not supported."""
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask is {attention_mask.dtype}; fastattn takes boolean masks (True where a "
            "key may be seen), no additive ones: pass `mask == 0` for a mask of zeros and "
            "-infinity, or model.set_attn_implementation('sdpa')"
        )
    for name, value in kwargs.items():
        if value is not None and name in _UNSUPPORTED:
            raise ValueError(
                f"{name}: fastattn does not support {_UNSUPPORTED[name]}; "
                "use model.set_attn_implementation('eager') or another that does"
            )
    if kwargs.get("output_attentions") or _weights_wanted():
        raise ValueError(
            "output_attentions: fastattn never forms the attention weights; "
            "use model.set_attn_implementation('eager') to have them"
        )
    if attention_mask is not None:
        return
    window = kwargs.get("sliding_window")
    if window is not None and seqlen_k > window:
        raise ValueError(
            f"sliding_window={window} without an attention_mask for {seqlen_k} keys: fastattn "
            "takes the window from the mask that transformers makes; pass that mask"
        )
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is not None and lengths.numel() > batch + 1:
        raise ValueError(
            f"cu_seq_lens_q packs {lengths.numel() - 1} sequences without an attention_mask: pass "
            "position_ids that start anew at each sequence, from which transformers makes the mask"
        )


def _weights_wanted() -> bool:
    """Whether the model collects attention weights (`output_attentions=True`) in this call.

    Models take that argument away before their layers see it. While torch.compile traces, the
    collector cannot be read; the model then returns no weights, as it does with "sdpa".
    """
    if _active_collector is None or torch.compiler.is_compiling():
        return False
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected
