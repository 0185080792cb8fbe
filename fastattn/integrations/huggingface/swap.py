"""Attention modules of transformers, one by one, on our implementation.

The hypothesis: a class whose forward dispatches through transformers' `AttentionInterface` leaves
the attention itself to a function that its config names, so that it runs on another function
unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface

from fastattn.backends import explanation_of
from fastattn.integrations.huggingface.dispatch import NAME
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.ops.attention import attention

# The implementation whose place ours takes: it has the same masks (boolean or none).
REPLACED = "sdpa"
BATCH, SEQLEN, SEQLEN_ENCODER = 2, 37, 29


class _FastattnConfig:
    """A live view of a model's config that names our attention implementation."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    _attn_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _FastattnConfig, (self.__dict__["_config"],)


class AttentionSwap(torch.nn.Module):
    """Gives an attention module of transformers our implementation, and leaves its forward to it.

    Such a module asks `self.config._attn_implementation` which function to call. The config itself
    is not the place to change: the whole model shares it (often several models do), it takes part
    in comparisons, and modules could not be left alone one by one. So the class answers `config`
    with a view that differs in this one word.

    The view stands in for "sdpa" only. After `model.set_attn_implementation("eager")` the module
    does what it is told and runs the original.
    """

    packed_by_mask_alone = True  # as "sdpa": see `attention_forward`

    @staticmethod
    def recogniser(bound: None) -> Recogniser:
        return ATTENTION

    # The instance's __dict__ by a second name: to the torch.compile of torch 2.11 an item of
    # `self.__dict__` is the attribute of that name, so that the property would ask itself.
    _attributes = torch.nn.Module.__dict__["__dict__"]

    @property
    def config(self) -> Any:
        config = self._attributes["config"]
        return _FastattnConfig(config) if config._attn_implementation == REPLACED else config

    @config.setter
    def config(self, value: Any) -> None:
        self._attributes["config"] = value


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    config = module.__dict__.get("config")
    if hasattr(config, "_attn_implementation") and _dispatches(type(module)):
        yield ATTENTION


def _dispatches(cls: type) -> bool:
    """Whether the forward of a class names an `AttentionInterface`."""
    original: Any = getattr(cls, "_fastattn_original", cls)
    forward: Any = inspect.unwrap(original.forward)
    code = getattr(forward, "__code__", None)
    names = () if code is None else code.co_names
    return any(isinstance(forward.__globals__.get(n), AttentionInterface) for n in names)


def _refusal(module: torch.nn.Module) -> str | None:
    implementation = module.__dict__["config"]._attn_implementation
    if implementation == REPLACED:
        return None
    if implementation == NAME:
        return f'its config already says attn_implementation="{NAME}"'
    return (
        f"its config says attn_implementation={implementation!r}, whose masks or results differ: "
        f'model.set_attn_implementation("{REPLACED}") before'
    )


def _probes(module: Any, draw: Draw) -> list[Probe]:
    """Calls without a mask and with one, by the names of the forward's arguments."""
    parameters = inspect.signature(
        getattr(type(module), "_fastattn_original", type(module)).forward
    ).parameters
    x = draw.normal(BATCH, SEQLEN, _width(module))
    given: dict[str, Any] = {}
    if "position_embeddings" in parameters:
        given["position_embeddings"] = _rotation(module, draw)
    positions = torch.arange(SEQLEN, device=draw.device)
    if "position_ids" in parameters:
        given["position_ids"] = positions.expand(BATCH, -1)
    if "cache_position" in parameters:
        given["cache_position"] = positions
    first = next(n for n in parameters if n != "self")
    if getattr(module, "is_cross_attention", False) and "encoder_hidden_states" in parameters:
        encoded = draw.normal(BATCH, SEQLEN_ENCODER, x.shape[-1])
        mask = draw.coin(BATCH, 1, SEQLEN, SEQLEN_ENCODER)
        mask[..., 0] = True  # implementations differ where a query sees nothing
        given["encoder_hidden_states"] = encoded
        masked = {"encoder_attention_mask": mask}
    else:
        mask = draw.coin(BATCH, 1, SEQLEN, SEQLEN).tril_()
        mask.diagonal(dim1=-2, dim2=-1).fill_(True)
        masked = {"attention_mask": mask} if "attention_mask" in parameters else {}
    calls = [{first: x, **given}]
    if "attention_mask" in parameters:  # where it has no default
        calls = [{first: x, **given, "attention_mask": None}]
    if masked:
        calls.append({first: x, **given, **masked})
    if "key_value_states" in parameters and "past_key_values" in parameters:
        encoded = draw.normal(BATCH, SEQLEN_ENCODER, x.shape[-1])
        calls.append({**calls[0], "key_value_states": encoded})
    return [Probe((), call) for call in calls]


def _width(module: torch.nn.Module) -> int:
    """The size of the hidden state: what the first linear layer takes."""
    for part in module.modules():
        if isinstance(part, torch.nn.Linear):
            return part.in_features
        if type(part).__name__ == "Conv1D":
            return int(part.get_parameter("weight").shape[0])
    raise ValueError("no linear layer tells the size of the hidden state")


def _rotation(module: Any, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles, as rotary embeddings make them: both halves alike."""
    width = int(_head_dim(module) * _rotated(module.__dict__["config"]))
    angles = draw.normal(BATCH, SEQLEN, width // 2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _head_dim(module: Any) -> int:
    config = module.__dict__["config"]
    for holder in (module, config):
        if isinstance(getattr(holder, "head_dim", None), int):
            return int(holder.head_dim)
    return int(config.hidden_size // config.num_attention_heads)


def _rotated(config: Any) -> float:
    """The share of a head's elements that is rotated."""
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    return float(factor or getattr(config, "partial_rotary_factor", None) or 1.0)


def example(module: Any, probe: Probe) -> torch.Tensor:
    """One head of q (batch, seqlen, 1, head_dim), without values."""
    x = next(v for v in probe.kwargs.values() if isinstance(v, torch.Tensor))
    return x.new_empty(BATCH, SEQLEN, 1, _head_dim(module), requires_grad=True)


def _backend(module: Any, probe: Probe) -> str | None:
    q = example(module, probe)
    causal = bool(getattr(module, "is_causal", True))
    return explanation_of(attention, q, q, q, causal=causal).backend


ATTENTION = Recogniser(
    words="attention that dispatches through transformers' AttentionInterface",
    mixin=AttentionSwap,
    probes=_probes,
    backend=_backend,
    refusal=_refusal,
)
