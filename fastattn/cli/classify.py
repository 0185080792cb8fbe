"""Tell the class of texts, with a classifier from a folder.

    fastattn classify FOLDER "我喜欢编程"
    fastattn classify FOLDER - < reviews.txt        a text a line

FOLDER has an encoder with a head for classification, as `fastattn train` saves it with the
objective "classification". Each line of the output has the class, its probability and the text.
"""

from __future__ import annotations

import argparse

from fastattn import models
from fastattn.cli import answers
from fastattn.nn.mode import in_mode
from fastattn.training.objectives.classification import Classification, ClassificationSettings

BATCH = 32  # texts, whose classes are printed together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with the model and its tokenizer")
    parser.add_argument("texts", nargs="+", metavar="text", help="- reads one a line from stdin")
    answers.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    texts = answers.texts(arguments)
    model, tokenizer = answers.load_for(
        arguments, models.EncoderForSequenceClassification, "fastattn classify"
    )
    config = model.config
    if config.n_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            "fastattn classify takes models that give a text one class of several; this one has "
            f"n_labels {config.n_labels} and the problem_type {config.problem_type!r}"
        )
    labels = answers.labels(config)
    settings = ClassificationSettings(labels=tuple(labels), context=min(512, config.n_positions))
    objective = Classification(tokenizer, settings)
    for first in range(0, len(texts), BATCH):
        part = texts[first : first + BATCH]
        with in_mode(model, training=False):
            rows = objective.probabilities(model, [{settings.field: text} for text in part])
        for text, row in zip(part, rows):
            best = int(row.argmax())
            print(f"{labels[best]}\t{row[best]:.4f}\t{' '.join(text.split())}")
    return 0
