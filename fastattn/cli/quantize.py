"""Quantise a model, and say what it costs: size, speed, perplexity before and after.

    fastattn quantize FOLDER --to int8 --out QUANTISED
    fastattn quantize FOLDER --to int8 --text held_out.txt
    fastattn quantize model.gguf --to int8 --out QUANTISED

FOLDER holds a decoder that `fastattn.models.load` reads, or is a GGUF file. The folder that --out
writes is read by all commands, with the same --dtype and on the same kind of device. Perplexity is
of the text, tokens a second of greedy generation after its first tokens, before and after
interleaved, by the processor's time on a CPU. Without --text a text of the package is read, which
most models have seen: give one that yours has not.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastattn import models
from fastattn.cli.answers import add_model, check_least
from fastattn.compression import MODES, quantize
from fastattn.compression.quantisation import size
from fastattn.models import GPT
from fastattn.training.data.corpus import load_corpus
from fastattn.training.evaluation.perplexity import perplexity
from fastattn.training.optional import require
from fastattn.training.tokenizer import Tokenizer

PROMPT = 32  # tokens
ROUNDS = 5
CONTEXT = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with the model and its tokenizer, or a GGUF file")
    parser.add_argument("--to", choices=MODES, default="int8", help="default: int8")
    parser.add_argument("--out", metavar="DIR", help="write the quantised model there")
    parser.add_argument("--text", metavar="FILE", help="for the perplexity, in UTF-8")
    parser.add_argument("--tokens", type=int, default=4096, help="of it (default: 4096)")
    parser.add_argument("--new-tokens", type=int, default=48, help="to time (default: 48)")
    add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    check_least(arguments, "tokens", "new_tokens")
    path = Path(arguments.folder).expanduser()
    text = _text(arguments.text)
    tokenizer, save_tokenizer = _tokenizer(path)
    dtype = getattr(torch, arguments.dtype)
    before = models.load(path, dtype=dtype, device=arguments.device)
    if not isinstance(before, GPT):
        raise ValueError(f"fastattn quantize takes decoders; {path} has a {type(before).__name__}")
    ids = tokenizer.encode(text)[: arguments.tokens]
    if len(ids) < 2:
        raise ValueError("the text for the perplexity has fewer than 2 tokens: give a longer one")
    text = tokenizer.decode(ids)
    after = copy.deepcopy(before)
    print(quantize(after, arguments.to))
    if arguments.out is not None:
        after.save_pretrained(arguments.out)
        save_tokenizer(arguments.out)
    speeds = _speeds((before, after), ids[:PROMPT], arguments.new_tokens)
    print(f"{'':10}{'MB':>10}{'tokens/s':>10}{'perplexity':>12}")
    rows = []
    for name, model, speed in zip(("before", "after"), (before, after), speeds):
        context = min(CONTEXT, model.config.n_positions)
        found = perplexity(model, tokenizer, text, context=context, stride=context).perplexity
        rows.append((size(model) / 1e6, speed, found))
        print(f"{name:10}{rows[-1][0]:10.1f} {speed:9.1f} {found:11.4f}", flush=True)
    ratios = [new / old for old, new in zip(*rows)]
    print(f"{'ratio':10}{ratios[0]:10.3f}{ratios[1]:10.2f}{ratios[2]:12.4f}")
    return 0


def _text(path: str | None) -> str:
    if path is None:
        return load_corpus()["english"]
    return Path(path).expanduser().read_text(encoding="utf-8")


def _tokenizer(path: Path) -> tuple[Tokenizer, Any]:
    """The tokenizer, and how to save it; transformers reads that of a GGUF file."""
    if path.suffix != ".gguf":
        tokenizer = Tokenizer.load(path)
        return tokenizer, tokenizer.save
    transformers = require("transformers", "hf", "the tokenizer of a GGUF file")
    theirs = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return Tokenizer.load(folder), theirs.save_pretrained


def _speeds(models: tuple[GPT, GPT], prompt: list[int], count: int) -> list[float]:
    """Tokens a second after the first one: the median of interleaved rounds."""
    clock = time.process_time if models[0].device.type == "cpu" else time.perf_counter
    ids = torch.tensor([prompt], device=models[0].device)
    count = min(count, models[0].config.n_positions - len(prompt) - 1)

    def seconds(model: GPT, tokens: int) -> float:
        start = clock()
        model.generate(ids, max_new_tokens=tokens, eos_token_id=())
        return clock() - start

    found: list[list[float]] = [[], []]
    for number in range(ROUNDS + 1):
        for model, times in zip(models, found):
            first, whole = seconds(model, 1), seconds(model, 1 + count)
            if number:  # the first round is for the caches
                times.append(count / max(whole - first, 1e-9))
    return [statistics.median(times) for times in found]
