"""Continue a text with a model from a folder.

    fastattn generate FOLDER "今天天气很好"
    fastattn generate FOLDER "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1
    fastattn generate FOLDER - --stop "\\n\\n" < prompt.txt

FOLDER is a Hugging Face folder of a family that `fastattn.models.load` reads. The text goes to
stdout as it comes, tokens a second to stderr.
"""

from __future__ import annotations

import argparse
import sys

from fastattn.cli import answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with the model and its tokenizer")
    parser.add_argument("prompt", help="the text to continue; - reads it from stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end it")
    answers.add_sampling(parser)
    answers.add_model(parser)
    answers.add_cache(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = answers.sampling(arguments)
    if not all(arguments.stop):
        raise ValueError("--stop must have no empty text")
    model, tokenizer = answers.load(arguments.folder, arguments, "fastattn generate")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("the prompt has no token: give a text")
    count = arguments.max_new_tokens
    tokens = min(len(ids) + max(count, 1), model.config.n_positions)
    engine = answers.engine(model, tokens, cache_dtype=arguments.cache_dtype)
    request = engine.submit(ids, max_new_tokens=count, **settings)
    answers.write(request, answers.TextStream(tokenizer, arguments.stop))
    return 0
