"""Answer questions by what stands in a passage, with a model from a folder.

    fastattn answer FOLDER --context passage.txt "北京是哪国的首都？"
    fastattn answer FOLDER --context - --count 3 "Who wrote it?" < passage.txt

FOLDER has an encoder with a head for question answering, as `fastattn train` saves it with the
objective "question_answering". Each line of the output has an answer, its score, and from which to
which character of the passage it stands. A passage may be of any length: it is read in windows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastattn import models
from fastattn.cli import answers
from fastattn.nn.mode import in_mode
from fastattn.training.objectives.question_answering import (
    QuestionAnswering,
    QuestionAnsweringSettings,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with the model and its tokenizer")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument(
        "--context", required=True, metavar="FILE", help="with the passage; - reads it from stdin"
    )
    parser.add_argument("--count", type=int, default=1, help="of answers (default: 1)")
    parser.add_argument("--longest", type=int, default=30, help="tokens of one (default: 30)")
    parser.add_argument(
        "--unanswerable", action="store_true", help='the passage may have none: then it is "-"'
    )
    answers.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    answers.check_least(arguments, "count", "longest")
    passage = _read(arguments.context)
    model, tokenizer = answers.load_for(
        arguments, models.EncoderForQuestionAnswering, "fastattn answer"
    )
    context = min(384, model.config.n_positions)
    settings = QuestionAnsweringSettings(
        context=context,
        overlap=min(128, context // 3),
        longest_question=min(64, context // 4),
        longest_answer=arguments.longest,
        unanswerable=arguments.unanswerable,
    )
    objective = QuestionAnswering(tokenizer, settings)
    with in_mode(model, training=False):
        for question in arguments.questions:
            for found in objective.answers(model, question, passage, count=arguments.count):
                text = " ".join(found.text.split()) or "-"
                print(f"{text}\t{found.score:.2f}\t{found.start}-{found.end}")
    return 0


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
