"""RoBERTa (Liu et al. 2019, arXiv:1907.11692)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.families.encoder import post_norm_family, read_labels, write_more


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    """The table of positions has rows before the first one: padding's, and those up to it."""
    pad = data["pad_token_id"]
    before = pad + 1 if isinstance(pad, int) else 0  # the config's own check names another
    return {**read_labels(data), "n_positions": data["max_position_embeddings"] - before}


def _write(config: EncoderConfig) -> dict[str, Any]:
    rows = config.n_positions + config.first_position
    return {**write_more(config), "max_position_embeddings": rows}


FAMILY = post_norm_family(
    "RoBERTa",
    "Roberta",
    {
        "encoder.pooler": "classifier.dense",
        "transform.dense": "lm_head.dense",
        "transform.norm": "lm_head.layer_norm",
        "decoder.weight": "lm_head.decoder.weight",
        "decoder.bias": "lm_head.bias",
        "classifier": "classifier.out_proj",
        "tagger": "classifier",
        "spans": "qa_outputs",
    },
    defaults={
        "vocab_size": 50265,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    fields={},
    constants={
        "positions": "counted",
        "pooler_dropout": True,
        "transform_activation": "gelu",  # whatever hidden_act is
    },
    read_more=_read,
    write_more=_write,
    spare=re.compile(r"pooler\.dense\..*"),
    aliases={"lm_head.decoder.bias": "lm_head.bias"},
)
