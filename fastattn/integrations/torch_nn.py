"""PyTorch's own modules, as `accelerate` meets them in any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.backends import explanation_of
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.nn import (
    LayerNorm,
    Linear,
    MultiheadAttention,
    RMSNorm,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastattn.ops.attention import attention
from fastattn.ops.layer_norm import layer_norm, rms_norm
from fastattn.ops.linear.few_rows import MIN_WEIGHTS, mkl_is_slow


def _norm_probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
    assert isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm))
    # A mean that is far from 0: where a norm loses digits if it does.
    return [Probe((draw.normal(3, 5, *module.normalized_shape) + 4.0,))]


def _norm_backend(
    function: Callable[..., Any], *names: str
) -> Callable[[torch.nn.Module, Probe], str | None]:
    """That of a norm whose weights have these names, its dimensions as one."""

    def backend(module: Any, probe: Probe) -> str | None:
        tensors = (probe.args[0], *(getattr(module, name) for name in names))
        folded = (t if t is None else t.flatten(-len(module.normalized_shape)) for t in tensors)
        return explanation_of(function, *folded, module.eps).backend

    return backend


def _linear_refusal(module: torch.nn.Module) -> str | None:
    assert isinstance(module, torch.nn.Linear)
    weight = module.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "fastattn's Linear differs from torch's only on a CPU in float32"
    if weight.numel() < MIN_WEIGHTS:
        return f"fastattn's Linear differs from torch's from {MIN_WEIGHTS} weights on"
    if not mkl_is_slow():
        return "F.linear is as fast here: fastattn's Linear gains where MKL is slow (AMD)"
    return None


def _linear_probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
    """One row and three, as in decoding, and many."""
    assert isinstance(module, torch.nn.Linear)
    rows = ((1, 1), (3, 1), (2, 7))
    return [Probe((draw.normal(*shape, module.in_features),)) for shape in rows]


def _attention_refusal(module: torch.nn.Module) -> str | None:
    assert isinstance(module, torch.nn.MultiheadAttention)
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn append a key that no mask covers"
    return None


def _sequence(module: Any, draw: Draw, length: int, features: int) -> torch.Tensor:
    """Two sequences in the layout of `module`, an attention."""
    shape = (2, length, features) if module.batch_first else (length, 2, features)
    return draw.normal(*shape)


def _hidden(draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """The causal mask of 7 positions, and a padding of them."""
    positions = torch.arange(7, device=draw.device)
    causal = positions[None, :] > positions[:, None]
    return causal, torch.stack([positions > 4, positions > 6])


def _attention_probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
    """On itself, with masks and without, and on other keys and values."""
    assert isinstance(module, torch.nn.MultiheadAttention)
    x = _sequence(module, draw, 7, module.embed_dim)
    key, value = (_sequence(module, draw, 5, size) for size in (module.kdim, module.vdim))
    across = Probe((x, key, value), {"need_weights": False})
    if not module._qkv_same_embed_dim:
        return [across]
    causal, padding = _hidden(draw)
    masks: tuple[dict[str, Any], ...] = (
        {},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "key_padding_mask": padding},
    )
    return [*(Probe((x, x, x), {"need_weights": False, **each}) for each in masks), across]


def _layer_probes(prefix: str) -> Callable[[torch.nn.Module, Draw], list[Probe]]:
    """Of an encoder's layer, or of a decoder's; its own masks are called `prefix`_mask ..."""

    def probes(module: Any, draw: Draw) -> list[Probe]:
        attends = module.self_attn
        x = _sequence(attends, draw, 7, attends.embed_dim)
        args: tuple[torch.Tensor, ...] = (x,)
        if prefix == "tgt":
            args = (x, _sequence(attends, draw, 5, attends.embed_dim))
        causal, padding = _hidden(draw)
        masks = {f"{prefix}_mask": causal, f"{prefix}_key_padding_mask": padding}
        return [Probe(args), Probe(args, masks)]

    return probes


def _attention_backend(module: Any, probe: Probe) -> str | None:
    """That of an attention, or of the one in a layer."""
    attends = getattr(module, "self_attn", module)
    q = probe.args[0].new_empty(2, 7, attends.num_heads, attends.head_dim, requires_grad=True)
    return explanation_of(attention, q, q, q).backend


# By exact class; a subclass may have another forward.
TABLE: dict[type[torch.nn.Module], Recogniser] = {
    torch.nn.Linear: Recogniser(  # a matrix product is a library's
        "Linear", Linear, _linear_probes, lambda *_: "torch", _linear_refusal
    ),
    torch.nn.LayerNorm: Recogniser(
        "LayerNorm", LayerNorm, _norm_probes, _norm_backend(layer_norm, "weight", "bias")
    ),
    torch.nn.MultiheadAttention: Recogniser(
        "MultiheadAttention",
        MultiheadAttention,
        _attention_probes,
        _attention_backend,
        _attention_refusal,
        fused=torch.nn.Module.children,
    ),
    torch.nn.TransformerEncoderLayer: Recogniser(
        "TransformerEncoderLayer",
        TransformerEncoderLayer,
        _layer_probes("src"),
        _attention_backend,
        fused=torch.nn.Module.modules,
    ),
    torch.nn.TransformerDecoderLayer: Recogniser(
        "TransformerDecoderLayer",
        TransformerDecoderLayer,
        _layer_probes("tgt"),
        _attention_backend,
        fused=torch.nn.Module.modules,
    ),
    torch.nn.RMSNorm: Recogniser(
        "RMSNorm", RMSNorm, _norm_probes, _norm_backend(rms_norm, "weight")
    ),
}
