"""Train a small GPT on the shipped text, generate from it, and accelerate transformers' GPT-2.

Everything that it makes goes to a folder: the model and its tokenizer, which transformers reads
too, the record of the training, the loss curve, and what was measured. It takes about three minutes
on two CPU cores; on a GPU the same command runs the Triton kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.models import GPT, GPTConfig
from fastattn.training import (
    History,
    Tokenizer,
    TokenSplit,
    TrainingConfig,
    load_corpus,
    sample_batch,
    split_text,
    tokenize,
    train,
)
from fastattn.training.comparison import Comparison, compare
from fastattn.training.files import write_text
from fastattn.training.optional import require

PROMPTS = ("今天天气很好", "And God said unto")
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 40}


@dataclass(frozen=True)
class Size:
    """How large the demo is."""

    characters: int | None  # of each text; None is all
    vocab_size: int
    layers: int
    heads: int
    width: int
    context: int
    batch_size: int
    steps: int
    new_tokens: int
    seconds: float  # to time each kind of work


FULL = Size(None, 4096, 4, 4, 256, 128, 8, steps=600, new_tokens=48, seconds=4.0)
QUICK = Size(20_000, 512, 2, 2, 64, 32, 4, steps=20, new_tokens=8, seconds=0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--steps", type=int, help=f"training steps, default: {FULL.steps}")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:1"; default: a GPU if there is one'
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and a part of the text, in seconds"
    )


def run(arguments: argparse.Namespace) -> int:
    """The whole demo; 1 if a result breaks the numeric rule or a saved model reads back changed."""
    # Whatever is missing is said before the work, not after it.
    for package, extra in (("tokenizers", "train"), ("rich", "train"), ("matplotlib", "train")):
        require(package, extra, "the demo")
    require("transformers", "hf", "the demo").utils.logging.disable_progress_bar()
    device = _device(arguments.device)
    size = QUICK if arguments.quick else FULL
    steps = size.steps if arguments.steps is None else arguments.steps
    config = TrainingConfig(
        steps=steps,
        batch_size=size.batch_size,
        context=size.context,
        learning_rate=2e-3,
        final_learning_rate=2e-4,
        warmup_steps=min(20, steps // 2),
        evaluation_interval=max(1, min(50, steps // 4)),
        seed=arguments.seed,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)

    tokenizer, split = _prepare(size)
    model = _model(size, tokenizer).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"model      {size.layers} layers, {size.width} wide, {parameters:,} parameters, {device}"
    )
    history = _train(model, split, config)
    _save(arguments.out, model, tokenizer, history)
    if history.interrupted:
        print(f"interrupted after {len(history.steps)} steps; saved in {arguments.out}")
        return 130

    gpt = GPT.from_pretrained(arguments.out, device=device).eval()
    probe = sample_batch(split.validation, 2, size.context, torch.Generator().manual_seed(0))
    unchanged = _read_back(model, gpt, probe[0].to(device))
    _generate(gpt, tokenizer, size.new_tokens, arguments.seed)

    comparisons = _compare(arguments.out, split, size, device)

    print(
        f"\nin {arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}"
    )
    print(f"took {time.perf_counter() - started:.0f} s")
    broken = [c for c in comparisons if not c.holds]
    for comparison in broken:
        print(f"fastattn: {comparison.dtype} breaks the numeric rule, see above", file=sys.stderr)
    if not unchanged:
        print("fastattn: the saved model gives other logits when it is read back", file=sys.stderr)
    return 1 if broken or not unchanged else 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f'--device must be "auto", "cpu", "cuda" or "cuda:N"; got {name!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            "fastattn doctor says more"
        )
    return device


def _prepare(size: Size) -> tuple[Tokenizer, TokenSplit]:
    """The tokenizer, trained on the training part alone, and the token streams."""
    corpus = {name: text[: size.characters] for name, text in load_corpus().items()}
    parts = {name: split_text(text) for name, text in corpus.items()}
    start = time.perf_counter()
    tokenizer = Tokenizer.train([part[0] for part in parts.values()], size.vocab_size)
    seconds = time.perf_counter() - start
    split = tokenize(tokenizer, parts)
    for name, text in corpus.items():
        print(f"corpus     {name}: {len(text):,} characters, the last tenth for validation")
    print(f"tokenizer  byte-level BPE, {tokenizer.vocab_size} tokens, trained in {seconds:.1f} s")
    print(f"tokens     {len(split.training):,} to train, {len(split.validation):,} to validate")
    return tokenizer, split


def _model(size: Size, tokenizer: Tokenizer) -> GPT:
    return GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size,
            n_positions=size.context,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.end_of_text,
        )
    )


def _train(model: GPT, split: TokenSplit, config: TrainingConfig) -> History:
    with _progress(config.steps) as on_progress:
        history = train(model, split.training, split.validation, config, on_progress)
    if history.evaluations and history.steps:
        first, last = history.evaluations[0], history.evaluations[-1]
        print(
            f"training   {len(history.steps)} steps, {history.training_tokens:,} tokens in "
            f"{history.training_seconds:.1f} s: {history.tokens_per_second:,.0f} tokens/s; "
            f"validation loss {first.loss:.3f} -> {last.loss:.3f}"
        )
    return history


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[History], None]]:
    """A progress bar on a terminal; elsewhere, a line for each validation."""
    rich_progress = require("rich.progress", "train", "the progress bar")
    bar = rich_progress.Progress(
        rich_progress.TextColumn("training  "),
        rich_progress.BarColumn(bar_width=30),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[state]}"),
        rich_progress.TimeRemainingColumn(),
    )
    task = bar.add_task("", total=steps, state="")
    printed = 0

    def show(history: History) -> None:
        nonlocal printed
        state = f"validation {history.evaluations[-1].loss:.3f}"
        if history.steps:
            state = f"loss {history.steps[-1].loss:.3f}, {state}"
            state += f", {history.tokens_per_second:,.0f} tokens/s"
        bar.update(task, completed=len(history.steps), state=state)
        if not bar.console.is_terminal and len(history.evaluations) > printed:
            printed = len(history.evaluations)
            print(f"  step {len(history.steps):>4}: {state}", flush=True)

    if not bar.console.is_terminal:
        yield show
        return
    with bar:
        yield show


def _save(folder: Path, model: GPT, tokenizer: Tokenizer, history: History) -> None:
    model.save_pretrained(folder)
    tokenizer.save(folder)
    history.save(folder / "history.json")
    history.plot(folder / "loss.png")
    print(f"saved      {folder}: model, tokenizer, history.json, loss.png")


@torch.no_grad()
def _read_back(trained: GPT, read: GPT, inputs: torch.Tensor) -> bool:
    """Whether the model that was read back gives the trained one's logits, bit for bit."""
    trained.eval()
    same = torch.equal(trained(inputs), read(inputs))
    print(f"read back  the logits are {'identical' if same else 'NOT identical'}")
    return same


def _generate(model: GPT, tokenizer: Tokenizer, new_tokens: int, seed: int) -> None:
    """Continue the prompts, greedily and sampled."""
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": SAMPLING | {"seed": seed}}
    for prompt in PROMPTS:
        ids = [tokenizer.encode(prompt)]
        print(f"\n{prompt} ...")
        for name, settings in ways.items():
            out = model.generate(ids, max_new_tokens=new_tokens, **settings)
            text = tokenizer.decode(out[0, len(ids[0]) :].tolist())
            # The last character may be cut in the middle of its bytes.
            print(f"  {name:<8} {' / '.join(text.rstrip(chr(0xFFFD)).splitlines())}")


def _compare(folder: Path, split: TokenSplit, size: Size, device: torch.device) -> list[Comparison]:
    """Compare with transformers, in bfloat16 too on a GPU; print and save what was measured."""
    batch = sample_batch(split.validation, 4, size.context, torch.Generator().manual_seed(1))
    comparisons = []
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        comparison = compare(
            folder,
            *batch,
            dtype=dtype,
            device=device,
            new_tokens=size.new_tokens,
            seconds=size.seconds,
        )
        _print_comparison(comparison)
        comparisons.append(comparison)
    measured = [comparison.as_dict() for comparison in comparisons]
    write_text(folder / "comparison.json", json.dumps(measured, indent=1) + "\n")
    return comparisons


def _print_comparison(comparison: Comparison) -> None:
    table = require("rich.table", "train", "the table")
    console: Any = require("rich.console", "train", "the table").Console(highlight=False)
    dtype = str(comparison.dtype).removeprefix("torch.")
    print(f"\ntransformers' GPT2LMHeadModel, accelerated, {dtype} on {comparison.device}")
    print(comparison.report)

    differences = table.Table("", title=None)
    for heading in ("max |ours - original|", "error of ours", "of the original", "rule"):
        differences.add_column(heading, justify="right")
    for row in comparison.differences:
        differences.add_row(
            row.name,
            f"{row.absolute:.2e}",
            f"{row.error:.2e}",
            f"{row.original_error:.2e}",
            "holds" if row.holds else "BROKEN",
        )
    console.print(differences)
    print("  (errors: max against float64, relative to the largest entry of the tensor)")

    speeds = table.Table("median of interleaved runs", title=None)
    for heading in ("original ms", "ours ms", "speed-up", "runs"):
        speeds.add_column(heading, justify="right")
    for speed in comparison.speeds:
        speeds.add_row(
            speed.name,
            f"{speed.original * 1e3:.2f}",
            f"{speed.ours * 1e3:.2f}",
            f"{speed.ratio:.2f}x",
            str(speed.rounds),
        )
    console.print(speeds)
