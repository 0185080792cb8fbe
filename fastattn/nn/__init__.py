"""Drop-in modules on the ops: torch's arguments and state_dict where torch has the class."""

from __future__ import annotations

from fastattn.nn.attention import Attention, KeyValueCache, PackedSequences, SequencePart
from fastattn.nn.feed_forward import FeedForward
from fastattn.nn.layer_norm import LayerNorm
from fastattn.nn.linear import Linear
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.relative_position_bias import RelativePositionBias
from fastattn.nn.rms_norm import OffsetRMSNorm, RMSNorm
from fastattn.nn.rotary_embedding import RotaryEmbedding
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastattn.nn.transformer_block import TransformerBlock

__all__ = [
    "Attention",
    "FeedForward",
    "KeyValueCache",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "OffsetRMSNorm",
    "PackedSequences",
    "RMSNorm",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SequencePart",
    "Transformer",
    "TransformerBlock",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
