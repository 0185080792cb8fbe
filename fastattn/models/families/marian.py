"""Marian (Junczys-Dowmunt et al. 2018, arXiv:1804.00344): the OPUS-MT translators."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.families import bart


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    decoders = data.get("decoder_vocab_size") or data["vocab_size"]
    if decoders != data["vocab_size"]:
        raise ValueError(
            '"decoder_vocab_size" must be the "vocab_size" of both sides, got '
            f"{decoders} and {data['vocab_size']}"
        )
    return bart.read_more(data)


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {**bart.write_more(config), "decoder_vocab_size": config.vocab_size}


FAMILY = dataclasses.replace(
    bart.FAMILY,
    title="Marian",
    model_type="marian",
    classes={"MarianMTModel": "EncoderDecoder", "MarianModel": "EncoderDecoder"},
    defaults={
        **bart.DEFAULTS,
        "vocab_size": 58101,
        "eos_token_id": 0,
        "pad_token_id": 58100,
        "decoder_start_token_id": 58100,
    },
    constants={"positions": "sinusoidal", "logits_bias": True, "frozen_padding": True},
    fixed={**bart.FIXED, "share_encoder_decoder_embeddings": True},
    read_more=_read,
    write_more=_write,
    # The table of sinusoids.
    ignored=re.compile(r"(encoder|decoder)\.embed_positions\.weight"),
    names=bart.NAMES,
)
