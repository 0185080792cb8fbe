"""Attention modules of transformers, one by one, on our implementation.

The hypothesis: a class whose forward dispatches through transformers' `AttentionInterface` leaves
the attention itself to a function that its config names, so that it runs on another function
unchanged.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface

from fastattn.backends import explanation_of
from fastattn.integrations.huggingface import dispatch
from fastattn.integrations.huggingface.dispatch import NAME, NAME_OR_EAGER
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.ops.attention import attention

# What is registered in place of an implementation: it takes the same masks and gives the same.
REPLACED_BY = {"sdpa": NAME, "eager": NAME_OR_EAGER}
BATCH, SEQLEN, SEQLEN_ENCODER = 2, 37, 29


class _FastattnConfig:
    """A live view of a model's config that names our attention implementation."""

    def __init__(self, config: Any, name: str) -> None:
        self.__dict__.update(_config=config, _attn_implementation=name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _FastattnConfig, (self.__dict__["_config"], self.__dict__["_attn_implementation"])


class AttentionSwap(torch.nn.Module):
    """Gives an attention module of transformers our implementation, and leaves its forward to it.

    Such a module asks `self.config._attn_implementation` which function to call. The config itself
    is not the place to change: the whole model shares it (often several models do), it takes part
    in comparisons, and modules could not be left alone one by one. So the class answers `config`
    with a view that differs in this one word.

    The view stands in for one implementation only: "sdpa" where the family has it, else "eager".
    After `model.set_attn_implementation(another)` the module does what it is told and runs the
    original.
    """

    _fastattn_bound: ClassVar[str]  # the implementation whose place ours takes
    _fastattn_eager: ClassVar[Any]  # the function that the original runs on "eager"

    packed_by_mask_alone = True  # as "sdpa": see `attention_forward`

    def __init_subclass__(cls) -> None:
        original: Any = vars(cls)["_fastattn_original"]
        cls._fastattn_eager = staticmethod(_eager_of(original))

    @staticmethod
    def recogniser(bound: str) -> Recogniser:
        return RECOGNISERS[bound]

    # The instance's __dict__ by a second name: to the torch.compile of torch 2.11 an item of
    # `self.__dict__` is the attribute of that name, so that the property would ask itself.
    _attributes = torch.nn.Module.__dict__["__dict__"]

    @property
    def config(self) -> Any:
        config, replaced = self._attributes["config"], self._fastattn_bound
        if config._attn_implementation != replaced:
            return config
        return _FastattnConfig(config, REPLACED_BY[replaced])

    @config.setter
    def config(self, value: Any) -> None:
        self._attributes["config"] = value


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    config = module.__dict__.get("config")
    if hasattr(config, "_attn_implementation") and _dispatches(type(module)):
        yield RECOGNISERS[dispatch.replaceable(type(config)) or "sdpa"]


def _dispatches(cls: type) -> bool:
    """Whether the forward of a class names an `AttentionInterface`."""
    return any(isinstance(value, AttentionInterface) for value in _globals(cls).values())


def _globals(cls: type) -> dict[str, Any]:
    """The globals that the forward of a class names."""
    original: Any = getattr(cls, "_fastattn_original", cls)
    forward: Any = inspect.unwrap(original.forward)
    code = getattr(forward, "__code__", None)
    names = () if code is None else code.co_names
    return {name: forward.__globals__.get(name) for name in names}


def _eager_of(cls: type) -> Callable[..., Any] | None:
    """The function that the forward of a class hands to `get_interface` for "eager"."""
    return next(
        (f for n, f in _globals(cls).items() if "eager" in n and isinstance(f, FunctionType)), None
    )


def _refusal(module: torch.nn.Module, replaced: str) -> str | None:
    config = module.__dict__["config"]
    implementation = config._attn_implementation
    if implementation == NAME:
        return f'its config already says attn_implementation="{NAME}"'
    if dispatch.replaceable(type(config)) is None:
        return (
            "its family has no implementation but \"eager\", and may count on its weights: "
            f'load it with attn_implementation="{NAME}" where it does not'
        )
    if implementation != replaced:
        return (
            f"its config says attn_implementation={implementation!r}, whose masks or results "
            f'differ: model.set_attn_implementation("{replaced}") before'
        )
    if replaced == "eager" and _eager_of(type(module)) is None:
        return "its forward names no function that gives attention weights when they are asked for"
    return None


# --- the calls of the proof ----------------------------------------------------------------------


def _guesses(module: Any, draw: Draw, additive: bool) -> Iterator[list[Probe]]:
    """Calls by the names of the forward's arguments, in the forms that families give them."""
    parameters = inspect.signature(
        getattr(type(module), "_fastattn_original", type(module)).forward
    ).parameters
    rotations = _ROTATIONS if "position_embeddings" in parameters else [None]
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
        given[first] = x = draw.normal(BATCH, length, _width(module))
        if rotation is not None:
            given["position_embeddings"] = rotation(module, draw, length)
        positions = torch.arange(length, device=draw.device)
        if "position_ids" in parameters:
            given["position_ids"] = positions.expand(BATCH, -1)
        if "cache_position" in parameters:
            given["cache_position"] = positions
        if "shared_kv_states" in parameters:  # the keys and values of an earlier layer
            given["shared_kv_states"] = _shared(module, draw, length)
        calls = [given]
        if getattr(module, "is_cross_attention", False) and "encoder_hidden_states" in parameters:
            given["encoder_hidden_states"] = draw.normal(BATCH, SEQLEN_ENCODER, x.shape[-1])
            seen = draw.coin(BATCH, 1, length, SEQLEN_ENCODER)
            seen[..., 0] = True  # implementations differ where a query sees nothing
            calls.append({**given, "encoder_attention_mask": seen})
        elif mask is not None:
            calls.append({**given, "attention_mask": mask(draw, length)})
        if "key_value_states" in parameters and "past_key_values" in parameters:
            encoded = draw.normal(BATCH, SEQLEN_ENCODER, x.shape[-1])
            calls.append({**given, "key_value_states": encoded})
        yield [Probe((), call) for call in calls]
        if mask is not None:  # a module that is never called without
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
    return draw.normal(BATCH, length, length).zero_().masked_fill(~_boolean(draw, length)[:, 0], -1e2)


def _width(module: torch.nn.Module) -> int:
    """The size of the hidden state: what the first linear layer takes."""
    for part in module.modules():
        if isinstance(part, torch.nn.Linear):
            return part.in_features
        if type(part).__name__ == "Conv1D":
            return int(part.get_parameter("weight").shape[0])
    raise ValueError("no linear layer tells the size of the hidden state")


def _shared(module: Any, draw: Draw, length: int) -> dict[str, Any]:
    if not getattr(module, "is_kv_shared_layer", False):
        return {}
    shape = BATCH, module.__dict__["config"].num_key_value_heads, length, _head_dim(module)
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


def _head_dim(module: Any) -> int:
    config = module.__dict__["config"]
    for holder in (module, config):
        if isinstance(getattr(holder, "head_dim", None), int):
            return int(holder.head_dim)
    return int(config.hidden_size // config.num_attention_heads)


def _rotated(module: Any) -> int:
    """How many elements of a head are rotated."""
    for name in ("qk_rope_head_dim", "rotary_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    config = module.__dict__["config"]
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = float(factor or getattr(config, "partial_rotary_factor", None) or 1.0)
    return int(_head_dim(module) * share)


def _backend(module: Any, probe: Probe) -> str | None:
    x = next(v for v in probe.kwargs.values() if isinstance(v, torch.Tensor))
    q = x.new_empty(BATCH, SEQLEN, 1, _head_dim(module), requires_grad=True)
    causal = bool(getattr(module, "is_causal", True))
    return explanation_of(attention, q, q, q, causal=causal).backend


def _recogniser(replaced: str) -> Recogniser:
    def guesses(module: torch.nn.Module, draw: Draw) -> Iterator[Sequence[Probe]]:
        return _guesses(module, draw, additive=replaced == "eager")

    return Recogniser(
        words="attention that dispatches through transformers' AttentionInterface",
        mixin=AttentionSwap,
        probes=lambda module, draw: next(guesses(module, draw)),
        guesses=guesses,
        backend=_backend,
        refusal=lambda module: _refusal(module, replaced),
        bound=replaced,
        outputs=1,  # "eager" gives its weights too, whether or not anyone asks
    )


RECOGNISERS = {replaced: _recogniser(replaced) for replaced in REPLACED_BY}
