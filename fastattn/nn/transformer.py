"""torch's transformer layers and stacks on the ops: attention, feed-forward, addition with norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.layer_norm import LayerNorm
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.plain import is_plain
from fastattn.ops.common import modes
from fastattn.ops.ffn import ffn

# The activations of torch's layers that are `fastattn.ffn`'s, as functions and as modules.
FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
MODULES = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}

# Inference on a CPU: for shorter sequences torch's fast path, one call of ATen that holds all the
# scores, takes 0.7 to 1.0 of our time; from there on ours takes 0.25 to 1.0 of its time (d_model 64
# to 512, batch 2, float32, AMD EPYC, one thread, torch 2.13, 2026-11-29).
FAST_PATH_BELOW = 256
FAST_PATH_BELOW_WITH_A_MASK = 128

Init = TypeVar("Init", bound=Callable[..., None])


def _signed_as(theirs: Callable[..., None]) -> Callable[[Init], Init]:
    """A decorator: with the signature of torch's constructor."""
    return cast("Callable[[Init], Init]", functools.wraps(theirs))


def _attend(
    attention: Any,
    query: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """The module ``attention`` from ``query`` to ``memory``, without its weights."""
    out: Tensor = attention(
        query,
        memory,
        memory,
        attn_mask=mask,
        key_padding_mask=padding,
        need_weights=False,
        is_causal=is_causal,
    )[0]
    return out


def _linear_layers(layer: Any, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))) of an encoder's or a decoder's layer.

    The weights go to the op without a call of the modules, unless a dropout is active, or a call
    would do more (`fastattn.nn.plain.is_plain`).
    """
    linear1, linear2, dropout = layer.linear1, layer.linear2, layer.dropout
    activation = _activation(layer.activation)
    if (
        activation is None
        or not is_plain(dropout, torch.nn.Dropout)
        or (dropout.training and dropout.p)
        or not is_plain(linear1, torch.nn.Linear)
        or not is_plain(linear2, torch.nn.Linear)
    ):
        out: Tensor = linear2(dropout(layer.activation(linear1(x))))
        return out
    return ffn(x, linear1.weight, linear1.bias, linear2.weight, linear2.bias, activation)


def _activation(activation: Any) -> str | None:
    """The name of `activation` in `fastattn.ffn`, None if it is no function known there."""
    if isinstance(activation, torch.nn.GELU):
        plain = is_plain(activation, torch.nn.GELU)
        return GELUS.get(activation.approximate) if plain else None
    if isinstance(activation, torch.nn.Module):
        cls = type(activation)
        return MODULES.get(cls) if is_plain(activation, cls) else None
    return next((name for function, name in FUNCTIONS if activation is function), None)


def _only_hides(mask: Tensor) -> bool:
    """Whether `mask`, on a CPU, is boolean or adds nothing but 0 and -infinity."""
    return not mask.is_floating_point() or bool(((mask == 0) | (mask == -torch.inf)).all())


def _add_and_norm(
    norm: Any, dropout: Any, branch: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of total = residual + dropout(branch)."""
    fused = is_plain(norm, torch.nn.LayerNorm) or is_plain(norm, LayerNorm)
    if fused and is_plain(dropout, torch.nn.Dropout) and dropout.p < 1.0:
        # As a function: it asks for no more than torch's norm has.
        p = dropout.p if dropout.training else 0.0
        return LayerNorm.forward(norm, branch, residual, dropout_p=p)
    total = residual + dropout(branch)
    return norm(total), total


def _adopt(module: torch.nn.Module) -> None:
    """Make `module` ours, and the parts that it has, where their class is exactly torch's."""
    module.__class__ = OURS.get(type(module), type(module))
    for name, part in module.named_children():
        if name != "activation":  # the caller's own
            _adopt(part)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fastattn's attention, ffn and layer_norm.

    Constructor, initial values, ``state_dict``, `forward`, masks and ``repr`` are torch's. Nothing
    is kept on the instance that torch does not keep, so
    ``module.__class__ = fastattn.nn.TransformerEncoderLayer`` turns an existing layer into this
    one (its ``self_attn`` by itself, in the same way), and the reverse turns it back.

    The linear layers with their activation (ReLU, GELU, tanh-GELU, SiLU) are one `fastattn.ffn`,
    unless a dropout between them is active. A branch's dropout, its addition and the norm after it
    are one `fastattn.layer_norm`. Parts with hooks, adapters or other weights than ordinary ones
    are called as modules.

    `why_torch` says which calls are left to torch's own forward: nested tensors, and on a CPU
    inference on short sequences, where torch's fast path is the faster one. (Not with masks that
    add to the scores other than 0 and -infinity, which the fast path takes for "hidden".)

    A query whose keys are all masked attends to nothing, as in `fastattn.nn.MultiheadAttention`
    and in torch's layer in training; torch's fast path gives NaN.

    Raises what torch's constructor raises.
    """

    @_signed_as(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(batch, seqlen, d_model) -> the same, seqlen first unless batch_first, or unbatched.

        ``src_mask`` (seqlen, seqlen) or (batch * nhead, seqlen, seqlen) and
        ``src_key_padding_mask`` (batch, seqlen): boolean, where **True hides the key**, or
        floating-point, added to the scores. ``is_causal`` is a hint that ``src_mask``, which must
        be given, is the causal mask.
        """
        own = src_mask, src_key_padding_mask, is_causal
        if self.why_torch(src, *own) is not None:
            return super().forward(src, *own)
        if self.norm_first:
            normed = self.norm1(src)
            attended = _attend(self.self_attn, normed, normed, *own)
            normed, x = _add_and_norm(self.norm2, self.dropout1, attended, src)
            return x + self._ff_block(normed)
        attended = _attend(self.self_attn, src, src, *own)
        x, _ = _add_and_norm(self.norm1, self.dropout1, attended, src)
        x, _ = _add_and_norm(self.norm2, self.dropout2, _linear_layers(self, x), x)
        return x

    def why_torch(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> str | None:
        """Why `forward` leaves a call with these arguments to torch's own; None if it does not."""
        if src.is_nested:
            return "nested tensors"
        if (
            self.training
            or src.device.type != "cpu"
            or src.dim() != 3
            or not getattr(self.self_attn, "batch_first", False)  # it has no fast path
            or modes.transformed()
            or modes.recorded()  # what is compiled serves every length
        ):
            return None
        masks = [mask for mask in (src_mask, src_key_padding_mask) if mask is not None]
        below = FAST_PATH_BELOW_WITH_A_MASK if masks else FAST_PATH_BELOW
        if (
            src.shape[1] >= below
            or (torch.is_grad_enabled() and modes.needs_grad(src, *self.parameters()))
            # The causal mask is known to.
            or not all(_only_hides(m) for m in masks if m is not src_mask or not is_causal)
        ):
            return None
        return f"on a CPU torch's fast path is the faster one below {below} positions"

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_linear_layers(self, x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fastattn's attention, ffn and layer_norm.

    All that `TransformerEncoderLayer` says holds here as well, but that torch has no fast path of
    its own for it: only nested tensors are left to torch's forward.
    """

    @_signed_as(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """``tgt`` (batch, seqlen, d_model), ``memory`` (batch, its seqlen, d_model) -> like tgt.

        seqlen is first unless batch_first; both may be unbatched. The masks are those of
        `TransformerEncoderLayer.forward`, of tgt on itself and of tgt on memory.
        """
        if tgt.is_nested or memory.is_nested:
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        across = memory_mask, memory_key_padding_mask, memory_is_causal
        if self.norm_first:
            normed = self.norm1(tgt)
            attended = _attend(self.self_attn, normed, normed, *own)
            normed, x = _add_and_norm(self.norm2, self.dropout1, attended, tgt)
            attended = _attend(self.multihead_attn, normed, memory, *across)
            normed, x = _add_and_norm(self.norm3, self.dropout2, attended, x)
            return x + self._ff_block(normed)
        attended = _attend(self.self_attn, tgt, tgt, *own)
        x, _ = _add_and_norm(self.norm1, self.dropout1, attended, tgt)
        attended = _attend(self.multihead_attn, x, memory, *across)
        x, _ = _add_and_norm(self.norm2, self.dropout2, attended, x)
        x, _ = _add_and_norm(self.norm3, self.dropout3, _linear_layers(self, x), x)
        return x

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_linear_layers(self, x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`, whose layers run on fastattn.

    The layers are copies of ``encoder_layer``: of ours, or of torch's, which then become ours.
    ``norm`` is the caller's object and stays what it is. `forward` is torch's own, with its nested
    tensors in inference (``enable_nested_tensor``), whose padded rows come out as zeros.
    """

    @_signed_as(torch.nn.TransformerEncoder.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self.layers)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`, whose layers run on fastattn.

    The layers are copies of ``decoder_layer``: of ours, or of torch's, which then become ours.
    ``norm`` is the caller's object and stays what it is. `forward` is torch's own.
    """

    @_signed_as(torch.nn.TransformerDecoder.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self.layers)


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer`, whose layers and norms run on fastattn.

    A ``custom_encoder`` or ``custom_decoder`` is the caller's object and stays what it is.
    """

    @_signed_as(torch.nn.Transformer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = {id(value) for value in (*args, *kwargs.values())}
        for part in (self.encoder, self.decoder):
            if id(part) not in given:
                _adopt(part)


OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
}
