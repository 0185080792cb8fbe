"""Models on the modules of `fastattn.nn`, and generating, reading and writing with them."""

from __future__ import annotations

from fastattn.models.cache import KVCache
from fastattn.models.config import GPTConfig
from fastattn.models.encoder import Encoder
from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.encoder_heads import (
    EncoderForMaskedLM,
    EncoderForQuestionAnswering,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
)
from fastattn.models.gpt import GPT
from fastattn.models.loading import load

__all__ = [
    "GPT",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "EncoderForMaskedLM",
    "EncoderForQuestionAnswering",
    "EncoderForSequenceClassification",
    "EncoderForTokenClassification",
    "GPTConfig",
    "KVCache",
    "load",
]
