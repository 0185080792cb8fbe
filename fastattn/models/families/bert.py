"""BERT (Devlin et al. 2018, arXiv:1810.04805), and the MiniLMs of sentence-transformers."""

from __future__ import annotations

import re

from fastattn.models.families.encoder import post_norm_family, read_labels, write_more

FAMILY = post_norm_family(
    "BERT",
    "Bert",
    {
        "transform.dense": "cls.predictions.transform.dense",
        "transform.norm": "cls.predictions.transform.LayerNorm",
        "decoder.weight": "cls.predictions.decoder.weight",
        "decoder.bias": "cls.predictions.bias",
        "classifier": "classifier",
        "tagger": "classifier",
        "spans": "qa_outputs",
    },
    defaults={},
    fields={"max_position_embeddings": "n_positions"},
    read_more=read_labels,
    write_more=write_more,
    # A folder of masked language modelling may still have the rest of the pretraining.
    spare=re.compile(r"pooler\.dense\..*|cls\.seq_relationship\..*"),
    # In checkpoints that once were TensorFlow's.
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
)
