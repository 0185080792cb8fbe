"""Models on the modules of `fastattn.nn`, and generating, reading and writing with them."""

from __future__ import annotations

from fastattn.models.cache import KVCache
from fastattn.models.config import GPTConfig
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.gpt import GPT
from fastattn.models.loading import load

__all__ = ["GPT", "EncoderDecoder", "EncoderDecoderConfig", "GPTConfig", "KVCache", "load"]
