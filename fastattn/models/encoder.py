"""Encoder: a bidirectional transformer, BERT's (Devlin et al. 2018) and what has become of it.

Shapes: B batch, T sequence length, C = n_embd.

    tokens, types (B, T)
      x = norm_e(wte[tokens] + wtt[types] + wpe[positions])          # (B, T, C)
      n_layer times:
          x = norm1(x + attention(x))                     # every token sees every other
          x = norm2(x + feed_forward(x))
      hidden = x                                          # (B, T, C)
      pooled = tanh(pooler(hidden[:, 0]))                 # (B, C)

A ModernBERT normalises before the branches: x = x + attention(norm1(x)), of rotated q and k, and
hidden = norm_f(x).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import nn
from fastattn.models import folder
from fastattn.models.config import ACTIVATIONS
from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.ids import check_ids
from fastattn.models.padding import Padding, read_mask
from fastattn.models.rotary import rotary_embeddings


class EncoderOutput(NamedTuple):
    """The states of all positions (B, T, C), and the pooled one (B, C), None without a pooler."""

    hidden: Tensor
    pooled: Tensor | None


class Encoder(folder.Pretrained):
    """A bidirectional transformer at any size: BERT's architecture, or another by its config.

        model = fastattn.models.Encoder(fastattn.models.EncoderConfig())
        hidden, pooled = model(tokens, attention_mask)

    New weights are BERT's: normal with standard deviation ``initializer_range``, biases and the
    embedding of padding zero.

    Args:
        config: sizes and settings.
        pooler: whether there is one; default ``config.pooler``.
        device, dtype: of the parameters. On device "meta" the model has shapes and no weights.
    """

    config_class = EncoderConfig

    def __init__(
        self,
        config: EncoderConfig,
        *,
        pooler: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        width, pad = config.n_embd, config.pad_token_id
        self.wte = torch.nn.Embedding(config.vocab_size, width, padding_idx=pad, **where)
        self.wpe = self.wtt = None
        if config.positions != "rotary":
            rows = config.first_position + config.n_positions
            padding_idx = pad if config.positions == "counted" else None
            self.wpe = torch.nn.Embedding(rows, width, padding_idx=padding_idx, **where)
        if config.n_token_types:
            self.wtt = torch.nn.Embedding(config.n_token_types, width, **where)
        self.rotary = rotary_embeddings(config, device)
        self.norm_e = layer_norm(config, where)
        self.dropout = torch.nn.Dropout(config.embd_pdrop)
        self.blocks = torch.nn.ModuleList(
            nn.TransformerBlock(
                width,
                config.n_head,
                config.feedforward_dim,
                dropout=config.resid_pdrop,
                attention_dropout=config.attn_pdrop,
                activation=ACTIVATIONS[config.activation_function],
                gated=config.gated,
                norm_eps=config.layer_norm_epsilon,
                norm_placement=config.norm_placement,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                feedforward_bias=config.mlp_bias,
                norm_bias=config.norm_bias,
                window=config.window(layer),
                **where,
            )
            for layer in range(config.n_layer)
        )
        self.norm_f = None
        if config.norm_placement == "pre":
            self.norm_f = layer_norm(config, where)
            self.blocks[0].norm1 = torch.nn.Identity()  # norm_e has been there
        pooler = config.pooler if pooler is None else pooler
        self.pooler = nn.Linear(width, width, **where) if pooler else None
        reset_parameters(self, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> EncoderOutput:
        """The states of all positions.

        Args:
            input_ids: (B, T) token ids, int32 or int64. Their values, and those of token_type_ids
                and position_ids, are checked on a CPU only, as `GPT.forward`'s.
            attention_mask: (B, T), integers or boolean: 0 or False where a position is padding,
                wherever that is. All inputs may hold anything there; the states there mean nothing.
            token_type_ids: (B, T), int32 or int64, from 0 to n_token_types - 1; default 0.
            position_ids: (B, T) or (1, T), int32 or int64; of learned positions the rows of their
                table, which "counted" ones begin at pad_token_id + 1. Default: 0, 1, ..., or as
                "counted" has them.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        hidden, _ = self.encode(input_ids, attention_mask, token_type_ids, position_ids)
        return EncoderOutput(hidden, None if self.pooler is None else self.pooled(hidden))

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        skip_padding: bool = True,
    ) -> tuple[Tensor, Padding | None]:
        """The states (B, T, C), and what was padding; arguments and errors are `forward`'s.

        With ``skip_padding`` no time goes to padding at the end, whose states are 0, where it costs
        no wait to look for it: on a CPU.
        """
        padding = None
        if isinstance(input_ids, Tensor):
            padding = read_mask(attention_mask, input_ids)
        if padding is not None:
            input_ids = input_ids.masked_fill(~padding.visible, self.config.pad_token_id or 0)
        check_ids("input_ids", input_ids, self.config.vocab_size)
        if input_ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"input_ids must have at most n_positions = {self.config.n_positions} tokens a "
                f"sequence, got {input_ids.shape[1]}"
            )
        token_types = self._token_types(token_type_ids, input_ids, padding)
        positions = self._positions(position_ids, input_ids, padding)
        hides: dict[str, Any] = {}
        if padding is not None and padding.packed is not None and skip_padding:
            hides = {"packed": padding.packed}
            input_ids, positions = padding.pack(input_ids), padding.pack(positions)
            token_types = None if token_types is None else padding.pack(token_types)
        elif padding is not None:
            hides = {"mask": padding.mask, "key_lengths": padding.key_lengths}
        hidden = self._states(input_ids, token_types, positions, hides)
        if "packed" in hides and padding is not None:
            hidden = padding.unpack(hidden)
        return hidden, padding

    def _states(
        self, tokens: Tensor, types: Tensor | None, positions: Tensor, hides: dict[str, Any]
    ) -> Tensor:
        """The whole model: (B, T) each, or (1, T) positions -> (B, T, C)."""
        x = self.wte(tokens)  # (B, T, C)
        if self.wtt is not None:
            x = x + (self.wtt.weight[0] if types is None else self.wtt(types))
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x = self.dropout(self.norm_e(x))

        rotary = {kind: angles(positions) for kind, angles in self.rotary.items()}
        residual = None  # left to the next norm: x is branch + residual
        for layer, block in enumerate(self.blocks):
            turns = rotary.get(self.config.layer_type(layer))
            x, residual = block(x, residual, rotary=turns, **hides)
        if self.norm_f is not None:
            x, _ = self.norm_f(x, residual)
        return x

    def pooled(self, hidden: Tensor) -> Tensor:
        """(B, T, C) or the states of the first positions (B, C) -> (B, C)."""
        if self.pooler is None:
            raise ValueError("this model has no pooler: build it with pooler=True")
        return torch.tanh(self.pooler(hidden[:, 0] if hidden.dim() == 3 else hidden))

    def _token_types(
        self, types: Tensor | None, input_ids: Tensor, padding: Padding | None
    ) -> Tensor | None:
        """(B, T), or None where all are 0."""
        if types is None:
            return None
        if self.wtt is None:
            raise ValueError("token_type_ids must be None: this model has no token types")
        if not isinstance(types, Tensor) or types.shape != input_ids.shape:
            raise ValueError(
                f"token_type_ids must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(types.shape) if isinstance(types, Tensor) else types!r}"
            )
        if padding is not None:
            types = types.masked_fill(~padding.visible, 0)
        check_ids("token_type_ids", types, self.config.n_token_types, of="n_token_types")
        return types

    def _positions(
        self, positions: Tensor | None, input_ids: Tensor, padding: Padding | None
    ) -> Tensor:
        """(1, T) or (B, T): rows of the table, or what is turned by."""
        if positions is None and self.config.positions == "counted":
            pad = self.config.first_position - 1
            counts = input_ids != pad
            return counts.cumsum(1) * counts + pad
        if positions is None:
            return torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        shapes = tuple(input_ids.shape), (1, input_ids.shape[1])
        if not isinstance(positions, Tensor) or tuple(positions.shape) not in shapes:
            raise ValueError(
                f"position_ids must have the shape {shapes[0]} or {shapes[1]}, "
                f"got {tuple(positions.shape) if isinstance(positions, Tensor) else positions!r}"
            )
        if padding is not None:
            positions = positions.masked_fill(~padding.visible, 0)
        rows = 2**31 if self.wpe is None else self.wpe.num_embeddings
        check_ids("position_ids", positions, rows, of="positions")
        return positions


def layer_norm(config: EncoderConfig, where: dict[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.norm_bias, **where)


@torch.no_grad()
def reset_parameters(model: torch.nn.Module, config: EncoderConfig) -> None:
    """Draw new weights from torch's generator."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=config.initializer_range)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
