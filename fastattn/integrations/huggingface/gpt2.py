"""GPT-2 of Hugging Face transformers: its attention and its MLP."""

from __future__ import annotations

from typing import Any

import torch
from transformers import activations
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.pytorch_utils import Conv1D

from fastattn.backends import explanation_of
from fastattn.integrations.huggingface.dispatch import NAME
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.nn.plain import is_plain
from fastattn.ops.attention import attention
from fastattn.ops.ffn import ffn

# The implementation whose place ours takes: it has the same masks (boolean or none).
REPLACED = "sdpa"


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

    The view stands in for "sdpa" alone. After `model.set_attn_implementation("eager")` the module
    does what it is told and runs the original.
    """

    packed_by_mask_alone = True  # as "sdpa": see `attention_forward`

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


def _attention_refusal(module: torch.nn.Module) -> str | None:
    implementation = module.__dict__["config"]._attn_implementation
    if implementation == REPLACED:
        return None
    if implementation == NAME:
        return f'its config already says attn_implementation="{NAME}"'
    return (
        f"its config says attn_implementation={implementation!r}, whose masks or results differ: "
        f'model.set_attn_implementation("{REPLACED}") before'
    )


def _attention_probes(module: Any, draw: Draw) -> list[Probe]:
    """Self-attention without a mask and with one; cross-attention likewise."""
    batch, seqlen, seqlen_encoder = 2, 37, 29
    x = draw.normal(batch, seqlen, module.embed_dim)
    if module.is_cross_attention:
        encoded = draw.normal(batch, seqlen_encoder, module.embed_dim)
        mask = draw.coin(batch, 1, seqlen, seqlen_encoder)
        mask[..., 0] = True  # implementations differ where a query sees nothing
        return [
            Probe((x,), {"encoder_hidden_states": encoded}),
            Probe((x,), {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}),
        ]
    mask = draw.coin(batch, 1, seqlen, seqlen).tril_()
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    return [Probe((x,)), Probe((x,), {"attention_mask": mask})]


def _attention_backend(module: Any, probe: Probe) -> str | None:
    q = probe.args[0].unflatten(-1, (module.num_heads, -1)).requires_grad_()
    causal = not module.is_cross_attention
    return explanation_of(attention, q, q, q, causal=causal, softmax_scale=module.scaling).backend


# The functions that `ffn` knows. transformers has several classes for one of them, which differ in
# how they round; a class that this version of transformers lacks is passed over.
ACTIVATIONS: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
    **{
        getattr(activations, name): function
        for name, function in {
            "NewGELUActivation": "gelu_tanh",
            "FastGELUActivation": "gelu_tanh",
            "AccurateGELUActivation": "gelu_tanh",
            "GELUTanh": "gelu_tanh",
            "PytorchGELUTanh": "gelu_tanh",
            "GELUActivation": "gelu",
            "SiLUActivation": "silu",
        }.items()
        if hasattr(activations, name)
    },
}


class FeedForwardSwap(torch.nn.Module):
    """GPT-2's MLP, dropout(c_proj(act(c_fc(x)))), with all but the dropout in one fused op."""

    c_fc: torch.nn.Module
    act: torch.nn.Module
    c_proj: torch.nn.Module
    dropout: torch.nn.Module

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # At every call, because hooks, adapters and parametrisations come and go.
        if _feed_forward_refusal(self) is not None:
            out: torch.Tensor = super().forward(hidden_states)
            return out
        fc: Any = self.c_fc
        proj: Any = self.c_proj
        out = ffn(
            hidden_states,
            fc.weight,
            fc.bias,
            proj.weight,
            proj.bias,
            ACTIVATIONS[type(self.act)],
            layout="conv1d",
        )
        dropped: torch.Tensor = self.dropout(out)
        return dropped


def _feed_forward_refusal(module: Any) -> str | None:
    act = module.act
    if type(act) not in ACTIVATIONS:
        return f"its activation {type(act).__name__} is none of {sorted(set(ACTIVATIONS.values()))}"
    for name, part, cls in (
        ("c_fc", module.c_fc, Conv1D),
        ("act", act, type(act)),
        ("c_proj", module.c_proj, Conv1D),
    ):
        if not is_plain(part, cls):
            return (
                f"{name} is a {type(part).__name__} that must be called itself: "
                "it has hooks, an adapter or another class than Conv1D"
            )
    return None


def _feed_forward_probes(module: Any, draw: Draw) -> list[Probe]:
    return [Probe((draw.normal(2, 7, module.c_fc.nx),))]


def _feed_forward_backend(module: Any, probe: Probe) -> str | None:
    fc, proj = module.c_fc, module.c_proj
    return explanation_of(
        ffn,
        probe.args[0],
        fc.weight,
        fc.bias,
        proj.weight,
        proj.bias,
        ACTIVATIONS[type(module.act)],
        layout="conv1d",
    ).backend


RECOGNISERS = {
    GPT2Attention: Recogniser(
        AttentionSwap, _attention_refusal, _attention_probes, _attention_backend
    ),
    GPT2MLP: Recogniser(
        FeedForwardSwap, _feed_forward_refusal, _feed_forward_probes, _feed_forward_backend
    ),
}
