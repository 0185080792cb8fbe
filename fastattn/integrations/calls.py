"""The calls with which attention modules and whole layers are proven, guessed by their signature.

Nobody states what such a module is called with. The names of its arguments say what each one is,
but families give them several forms: rotary embeddings as cos and sin of both halves, of pairs, or
complex; masks that are boolean, added, or of windows. The first guess that the original runs is
taken; an argument that no name explains is left out, and the module alone if it needs it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from fastattn.integrations.proof import Draw, Probe

BATCH, SEQLEN, SEQLEN_ENCODER = 2, 37, 29


def guesses(
    module: Any, draw: Draw, additive: bool = False, width: int | None = None
) -> Iterator[list[Probe]]:
    """Calls by the names of the forward's arguments, in the forms that families give them.

    Args:
        additive: whether masks are added to the scores, and not boolean.
        width: the size of the hidden state, by default the inputs of the first linear layer.
    """
    parameters = inspect.signature(
        getattr(type(module), "_fastattn_original", type(module)).forward
    ).parameters
    turns = "position_embeddings" in parameters or {"cos", "sin"} <= parameters.keys()
    rotations = _ROTATIONS if turns else [None]
    masks: tuple[Any, ...] = (None,)
    if "attention_mask" in parameters:
        masks = _additive if additive else _boolean, _of_windows
    for length, mask, rotation in itertools.product(_lengths(module), masks, rotations):
        if rotation is _by_kind and not hasattr(module, "rope_layer_type"):
            continue
        given: dict[str, Any] = {
            name: None
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and name != "self"
        }
        first = next(n for n in parameters if n != "self")
        given[first] = x = draw.normal(BATCH, length, width or _widths(module)[0])
        if rotation is not None:
            angles = rotation(module, draw, length)
            if "position_embeddings" in parameters:
                given["position_embeddings"] = angles
            elif isinstance(angles, tuple):
                given["cos"], given["sin"] = angles
        positions = torch.arange(length, device=draw.device)
        if "position_ids" in parameters:
            given["position_ids"] = positions.expand(BATCH, -1)
        if "cache_position" in parameters:
            given["cache_position"] = positions
        if "shared_kv_states" in parameters:  # the keys and values of an earlier layer
            given["shared_kv_states"] = _shared(module, draw, length)
        calls = [given]
        if getattr(module, "is_cross_attention", False) and "encoder_hidden_states" in parameters:
            encoded = draw.normal(BATCH, SEQLEN_ENCODER, _widths(module)[-1])
            given["encoder_hidden_states"] = encoded
            if "encoder_attention_mask" in parameters:
                seen = draw.coin(BATCH, 1, length, SEQLEN_ENCODER)
                seen[..., 0] = True  # implementations differ where a query sees nothing
                calls.append({**given, "encoder_attention_mask": seen})
        elif mask is not None:
            calls.append({**given, "attention_mask": mask(draw, length)})
        if "residual" in parameters:
            given["residual"] = draw.normal(*x.shape)
        if "key_value_states" in parameters and not getattr(module, "is_causal", False):
            encoded = draw.normal(BATCH, SEQLEN_ENCODER, x.shape[-1])
            yield [Probe((), call) for call in (*calls, {**given, "key_value_states": encoded})]
        yield [Probe((), call) for call in calls]
        if len(calls) > 1:  # a module that is never called without a mask
            yield [Probe((), calls[1])]


def _lengths(module: torch.nn.Module) -> list[int]:
    """A length that is a multiple of nothing, and the only one that attention in windows takes."""
    lengths = [SEQLEN]
    for part in module.modules():
        window = part.__dict__.get("window_size")
        if isinstance(window, (tuple, list)) and len(window) == 2:
            lengths.append(window[0] * window[1])
    return list(dict.fromkeys(lengths))


def _boolean(draw: Draw, length: int) -> torch.Tensor:
    mask = draw.coin(BATCH, 1, length, length).tril_()
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)  # implementations differ if a query sees nothing
    return mask


def _additive(draw: Draw, length: int) -> torch.Tensor:
    hidden = ~_boolean(draw, length)
    return draw.normal(*hidden.shape).zero_().masked_fill(hidden, torch.finfo(draw.dtype).min)


def _of_windows(draw: Draw, length: int) -> torch.Tensor:
    """(windows, queries, keys), added."""
    return (
        draw.normal(BATCH, length, length).zero_().masked_fill(~_boolean(draw, length)[:, 0], -1e2)
    )


def _widths(module: torch.nn.Module) -> list[int]:
    """The sizes that linear layers take: first the hidden state's, last the encoder's."""
    sizes = []
    for part in module.modules():
        if isinstance(part, torch.nn.Linear):
            sizes.append(part.in_features)
        elif type(part).__name__ == "Conv1D":
            sizes.append(int(part.get_parameter("weight").shape[0]))
    if not sizes:
        raise ValueError("no linear layer tells the size of the hidden state")
    return list(dict.fromkeys(sizes))


def _shared(module: Any, draw: Draw, length: int) -> dict[str, Any]:
    if not getattr(module, "is_kv_shared_layer", False):
        return {}
    shape = BATCH, _config(module).num_key_value_heads, length, head_dim(module)
    return {module.layer_type: (draw.normal(*shape), draw.normal(*shape))}


def _angles(module: Any, draw: Draw, length: int) -> torch.Tensor:
    return draw.normal(BATCH, length, _rotated(module) // 2)


def _halves(module: Any, draw: Draw, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as rotary embeddings make them: both halves alike."""
    angles = _angles(module, draw, length)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _of_all_rows(module: Any, draw: Draw, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for every row of the batch, without its dimension."""
    cos, sin = _halves(module, draw, length)
    return cos[0], sin[0]


def _pairs(module: Any, draw: Draw, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sin and cos once per pair of elements."""
    angles = _angles(module, draw, length)
    return angles.sin(), angles.cos()


def _complex(module: Any, draw: Draw, length: int) -> torch.Tensor:
    """cos + i sin."""
    angles = _angles(module, draw, length).float()
    return torch.polar(torch.ones_like(angles), angles)


def _by_kind(module: Any, draw: Draw, length: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """cos and sin once per pair, by the kind of the layer."""
    angles = _angles(module, draw, length)
    return {module.rope_layer_type: (angles.cos(), angles.sin())}


_ROTATIONS = (_halves, _of_all_rows, _pairs, _complex, _by_kind)


def head_dim(module: torch.nn.Module) -> int:
    """As the module says, or a part of it, or the config of one."""
    size = _number(module, "head_dim", "attention_head_size")
    if size is None:
        config = _config(module)
        size = config.hidden_size // config.num_attention_heads
    return int(size)


def _rotated(module: torch.nn.Module) -> int:
    """How many elements of a head are rotated."""
    size = _number(module, "qk_rope_head_dim", "rotary_dim")
    if size is not None:
        return size
    config = _config(module)
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = float(factor or getattr(config, "partial_rotary_factor", None) or 1.0)
    return int(head_dim(module) * share)


def _number(module: torch.nn.Module, *names: str) -> int | None:
    """The first of these attributes of the module and its parts, then of their configs."""
    parts = list(module.modules())
    for holder in (*parts, *(part.__dict__.get("config") for part in parts)):
        for name in names:
            with contextlib.suppress(Exception):  # a config may refuse to answer
                if isinstance(value := getattr(holder, name), int):
                    return value
    return None


def _config(module: torch.nn.Module) -> Any:
    return next((m.__dict__["config"] for m in module.modules() if "config" in m.__dict__), None)
