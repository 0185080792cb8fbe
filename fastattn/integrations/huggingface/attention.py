"""`fastattn.attention` behind transformers' AttentionInterface.

transformers calls an attention implementation with q, k, v as (batch, heads, seqlen, head_dim) and
a mask made by the mask function of the same name, and expects (batch, seqlen, heads, head_dim).
fastattn's own layout is the latter; both ways are transposed views, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from fastattn.integrations.huggingface import dispatch
from fastattn.integrations.huggingface.dispatch import NAME, NAME_OR_EAGER
from fastattn.ops.attention import attention, attention_varlen, straight
from fastattn.ops.common import modes

try:  # younger than transformers 5.0, and not public
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

# Arguments of other implementations that change the result. (Those that are honoured are looked at
# one by one; what is left changes nothing: `use_cache`, `deterministic`, `sliding_window`.)
_UNSUPPORTED = {
    "head_mask": "a mask of heads",
    "block_indices": "sparse attention by blocks",
    "cache": "a paged cache (continuous batching)",
}


# Set on a mask that `make_mask` made without padding, and on position_ids once they are read.
_UNPADDED = "fastattn_unpadded"
_READ = "fastattn_sequences"


def register() -> None:
    """Make `attn_implementation="fastattn"` known to transformers. Harmless if repeated."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionInterface.register(NAME_OR_EAGER, attention_or_eager)
    AttentionMaskInterface.register(NAME, make_mask)
    dispatch.refuse_when_chosen()


def make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask of a layer, which has padding, packed sequences, windows and static caches in it.

    Boolean, True where a key may be seen, or None where the module's own causality says it all.
    But a mask as that of "eager", which is added to the scores, and is never None:

    - for the families that count on it (`fastattn.integrations.huggingface.dispatch`);
    - for deepseek_v4, which appends the scores of its compressed keys, in the mask's dtype.

    And gemma4 may drop queries after the mask is made, which `None` could not tell.

    Raises:
        ValueError: the family does not dispatch; the message names it and the fix.
    """
    config = kwargs.get("config")
    model_type = getattr(config, "model_type", None) or ""
    boolean = config is None or dispatch.takes_boolean_masks(type(config))
    if model_type.startswith("gemma4"):
        kwargs["allow_is_causal_skip"] = False
    elif model_type.startswith("deepseek_v4"):
        boolean = False
    if not boolean:
        kwargs["allow_is_bidirectional_skip"] = False
    mask = (sdpa_mask if boolean else eager_mask)(*args, **kwargs)
    if mask is not None and _is_unpadded(**kwargs):
        setattr(mask, _UNPADDED, True)
    return mask


def _is_unpadded(
    attention_mask: torch.Tensor | None = None, q_length: int = 0, kv_length: int = 0, **_: Any
) -> bool:
    """Whether no token is padding, as far as position_ids are of interest and that can be read.

    The positions of padding are made up (0, mostly), and would pass for sequences that begin.
    """
    if attention_mask is None:
        return True
    of_interest = q_length == kv_length and q_length > 1
    can_be_read = not is_tracing(attention_mask) and modes.readable(attention_mask)
    return of_interest and can_be_read and bool(attention_mask.all())


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for a module of transformers, with the conventions of its "sdpa".

    With a mask, the mask decides which keys a query sees: transformers has put causality and
    windows into it. Without one, and with more than one query and `is_causal` (default: the
    module's, else True), query i sees the keys j <= i; a longer key is the empty rest of a static
    cache. A query that sees no key gives 0.

    Packed sequences are kept apart whatever the mask, in the families too whose masks do not know
    of them: by `cu_seq_lens_q`, or else by `position_ids` that restart. (ModernBERT, DistilBERT and
    others hand no position_ids to their layers, and need the former.)

    `sliding_window`, which is for flash-attn, is ignored as "eager" and "sdpa" ignore it: every
    family that has a window asks for masks with it, and leaves them out where it does not bind;
    some (OLMoE, DeepSeek-OCR-2) pass one to layers that they mean to have none.

    Args:
        query: (batch, heads, seqlen_q, head_dim); a batch of 1 broadcasts.
        key, value: (batch, kv_heads, seqlen_k, head_dim); kv_heads divides heads, and the head_dim
            of value may differ.
        attention_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k). Boolean, True where a
            key may be seen, or floating-point, added to the scores.
        dropout: probability with which an attention weight is dropped.
        scaling: factor of the scores, default 1 / sqrt(head_dim).
        softcap: c for scores c tanh(s / c); None or 0 for none.
        position_bias: (1 or batch, heads, seqlen_q, seqlen_k), added to the scores.
        s_aux: (heads,), a logit per head that takes part only in the softmax.
        sinks: (batch, heads, seqlen_q, 1), the same per query.
        indices: (batch, seqlen_q, n), the only keys that a query sees.
        position_ids: (batch, seqlen), with as many keys as queries: wherever a row is at its least
            value again, a sequence begins, as transformers' flash attention has it; a row of one
            value says nothing. Not where there is padding, nor a mask that the user made.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), where the sequences begin that are packed in
            the batch's rows, of at most `max_length_q` and `max_length_k` tokens; default of k:
            those of q. Tokens after the last one see nothing and give 0. With a mask, indices or
            a position_bias, which are of rows, a sequence ends with its row at the latest.
        kwargs: whatever else the module passes. Arguments that would change the result must be
            None.

    Returns:
        The output (batch, seqlen_q, heads, head_dim), and None for the attention weights, which
        are never formed.

    Raises:
        ValueError: an argument that cannot be honoured; the message names it and the fix.
    """
    _check(attention_mask, kwargs)
    if (  # a token of decoding: nothing is left to hide from it
        query.shape[2] == 1 and attention_mask is None and position_bias is None and s_aux is None
        and sinks is None and indices is None and cu_seq_lens_q is None and not (softcap or dropout)
    ):  # fmt: skip
        out = straight.heads_first(query, key, value, False, scaling)
        if out is not None:
            return out, None
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] != batch:  # learned queries
        query = query.expand(batch, -1, -1, -1)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if getattr(module, "packed_by_mask_alone", False):  # it stands in for one with "sdpa"
        position_ids = cu_seq_lens_q = None
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sink": _as_float(s_aux, query),
        "dropout_p": dropout,
        "return_lse": sinks is not None,
    }
    of_rows = attention_mask is not None or position_bias is not None or indices is not None
    if cu_seq_lens_q is not None and not of_rows:
        starts = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        lengths = max_length_q, max_length_k
        options["causal"] = bool(is_causal)
        return _packed(query, key, value, starts, lengths, sinks, options), None

    mask, bias = attention_mask, position_bias
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        mask, bias = None, attention_mask if bias is None else bias + attention_mask
    if indices is not None:
        chosen = torch.zeros(batch, 1, seqlen_q, seqlen_k, dtype=torch.bool, device=query.device)
        chosen.scatter_(-1, indices[:, None].long(), True)
        mask = chosen if mask is None else mask & chosen
    # The length comes first, so that torch.compile sees a bool and not a symbol.
    causal = seqlen_q > 1 and attention_mask is None and is_causal
    if causal and seqlen_k != seqlen_q:
        if seqlen_k < seqlen_q:
            raise ValueError(
                f"key has {seqlen_k} positions, query {seqlen_q}: which keys a query may see is "
                "not defined without an attention_mask"
            )
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
        mask, bias = (x if x is None else x[..., :seqlen_q] for x in (mask, bias))
    if cu_seq_lens_q is not None:
        ends_q = cu_seq_lens_q[1:]
        ends_k = ends_q if cu_seq_lens_k is None else cu_seq_lens_k[1:]
        # Keys after the last sequence belong to one that no query belongs to.
        ends_k = torch.cat([ends_k, ends_k[-1:]])
        options["document_ids"] = _documents(query, ends_q), _documents(key, ends_k)
    elif attention_mask is None or getattr(attention_mask, _UNPADDED, False):
        options["document_ids"] = _restarts(position_ids, query, key)
    run: Callable[..., Any] = attention
    result = run(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal,
        bias=_as_float(bias, query),
        mask=mask,
        **options,
    )
    if sinks is None:
        return result, None
    out, lse = result
    return _with_sinks(out, lse, sinks), None


def attention_or_eager(
    module: Any, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_forward` in the place of "eager", which runs itself where its weights are wanted.

    For modules that `accelerate` has swapped (huggingface/swap.py), and no name for a model.
    """
    wanted = kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)
    beyond = any(kwargs.get(name) is not None for name in _UNSUPPORTED)
    if wanted or beyond or _weights_wanted():
        eager: Any = module._fastattn_eager
        return eager(module, *args, **kwargs)
    # To "eager" the mask says everything.
    return attention_forward(module, *args, **{**kwargs, "is_causal": False})


def _documents(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The number of each token's sequence, (batch, seqlen), for x (batch, heads, seqlen, ...)."""
    batch, _, seqlen, _ = x.shape
    tokens = torch.arange(batch * seqlen, dtype=ends.dtype, device=ends.device)
    return torch.bucketize(tokens, ends, right=True).view(batch, seqlen)


def _restarts(
    position_ids: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The number of each token's sequence, (batch, seqlen); None if there is one, or no telling.

    For that the positions are read, so that the usual sequence keeps to the usual path: once per
    forward, the answer staying on them for the other layers. Where they cannot be read (while
    torch.compile or a CUDA graph records) the numbers are made and stay on the device.
    """
    batch, _, seqlen, _ = query.shape
    if (
        position_ids is None
        or seqlen == 1
        or key.shape[2] != seqlen
        or position_ids.shape != (batch, seqlen)  # (1, seqlen) is how models count by themselves
    ):
        return None
    if is_tracing(position_ids) or not modes.readable(position_ids):
        return _numbers(position_ids)
    # Their owner may write into them, which an inference tensor does not tell.
    version = None if position_ids.is_inference() else position_ids._version
    read_at, numbers = getattr(position_ids, _READ, (None, None))
    if version is None or version != read_at:
        numbers = _numbers(position_ids)
        if int(numbers.amax()) <= 1:
            numbers = None
        setattr(position_ids, _READ, (version, numbers))
    return numbers


def _numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Counts, along each row of positions, how often they were at their least value."""
    numbers = (position_ids == position_ids.amin(-1, keepdim=True)).cumsum(-1)
    return numbers * (numbers[:, -1:] < position_ids.shape[1])  # but not if they never left it


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    lengths: tuple[int | torch.Tensor | None, int | torch.Tensor | None],
    sinks: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Sequences that lie one after another in the rows of the batch."""
    rows = query.shape[0], query.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    longest_q, longest_k = (None if n is None else int(n) for n in lengths)
    run: Callable[..., Any] = attention_varlen
    result = run(q, k, v, *starts, longest_q, longest_k, **options)
    if sinks is None:
        out: torch.Tensor = result.unflatten(0, rows)
        return out
    out, lse = result
    return _with_sinks(out.unflatten(0, rows), lse.unflatten(1, rows).transpose(0, 1), sinks)


def _as_float(x: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A bias or sink in a dtype that the op takes: the query's, or float32."""
    if x is None:
        return None
    dtype = modes.autocast_dtype(query.device.type) or query.dtype
    return x if x.dtype in (dtype, torch.float32) else x.float()


def _with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """`out` (batch, seqlen, heads, head_dim) with one more logit per query in its denominator.

    sum exp(s) / (sum exp(s) + exp(sink)) = sigmoid(lse - sink), lse (batch, heads, seqlen).
    """
    kept = torch.sigmoid(lse - sinks.squeeze(-1)).mT.unsqueeze(-1)
    return (out * kept).to(out.dtype)


def _check(attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise for what would change the result and is not supported."""
    if attention_mask is not None and not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        raise ValueError(
            f"attention_mask is {attention_mask.dtype}; it must be boolean (True where a key may "
            "be seen) or floating-point (added to the scores): pass `mask.bool()`"
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


def _weights_wanted() -> bool:
    """Whether the model collects attention weights (`output_attentions=True`) in this call.

    Models take that argument away before their layers see it. While torch.compile traces a part of
    a model, the collector cannot be read; it then returns no weights, as it does with "sdpa".
    """
    if _active_collector is None:
        return False
    if torch.compiler.is_compiling() and not _active_collector.compiling:
        return False
    return any(name.endswith("attentions") for name in _active_collector.get() or ())
