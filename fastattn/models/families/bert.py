"""BERT (Devlin et al. 2018, arXiv:1810.04805), and the MiniLMs of sentence-transformers."""

from __future__ import annotations

import re

from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.families.encoder import (
    POST_NORM_DEFAULTS,
    POST_NORM_DEPTHS,
    POST_NORM_FIELDS,
    POST_NORM_FIXED,
    RENAMED,
    classes,
    post_norm_names,
    read_labels,
    with_heads,
    write_more,
)
from fastattn.models.families.family import Family

FAMILY = Family(
    title="BERT",
    model_type="bert",
    classes=classes("Bert"),
    config_class=EncoderConfig,
    fields={**POST_NORM_FIELDS, "max_position_embeddings": "n_positions"},
    defaults=POST_NORM_DEFAULTS,
    fixed=POST_NORM_FIXED,
    read_more=read_labels,
    write_more=write_more,
    prefix="bert.",
    depths=POST_NORM_DEPTHS,
    # Positions that older versions of transformers saved as a buffer.
    ignored=re.compile(r"embeddings\.position_ids"),
    # A folder of masked language modelling may still have the rest of the pretraining.
    spare=re.compile(r"pooler\.dense\..*|cls\.seq_relationship\..*"),
    renamed=RENAMED,
    aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    names=with_heads(
        post_norm_names("bert."),
        {
            "transform.dense": "cls.predictions.transform.dense",
            "transform.norm": "cls.predictions.transform.LayerNorm",
            "decoder.weight": "cls.predictions.decoder.weight",
            "decoder.bias": "cls.predictions.bias",
            "classifier": "classifier",
            "tagger": "classifier",
            "spans": "qa_outputs",
        },
    ),
)
