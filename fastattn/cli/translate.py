"""Translate texts, or turn them into what else an encoder-decoder was trained to write.

    fastattn translate FOLDER "Save changes?"
    fastattn translate FOLDER --prefix "translate English to German: " "Good morning"
    fastattn translate FOLDER - < texts.txt         a text a line

FOLDER has an encoder-decoder, as `fastattn train` saves it with the objective
"sequence_to_sequence", or a T5, BART or Marian with a tokenizer.json.
"""

from __future__ import annotations

import argparse

from fastattn import models
from fastattn.cli import answers
from fastattn.nn.mode import in_mode
from fastattn.training.evaluation.translation import translations
from fastattn.training.objectives.sequence_to_sequence import (
    SequenceToSequence,
    SequenceToSequenceSettings,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with the model and its tokenizer")
    parser.add_argument("texts", nargs="+", metavar="text", help="- reads one a line from stdin")
    parser.add_argument("--prefix", default="", help="a text before each, as T5's for its tasks")
    parser.add_argument("--beams", type=int, default=4, help="1 is greedy (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    answers.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    model, tokenizer = answers.load_for(arguments, models.EncoderDecoder, "fastattn translate")
    settings = SequenceToSequenceSettings(prefix=arguments.prefix)
    objective = SequenceToSequence(tokenizer, settings)
    sources = [objective.source_ids(text).tolist() for text in answers.texts(arguments)]
    with in_mode(model, training=False):
        for text in translations(
            model,
            tokenizer,
            sources,
            num_beams=arguments.beams,
            max_new_tokens=arguments.max_new_tokens,
        ):
            print(text)
    return 0
