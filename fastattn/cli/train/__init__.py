"""Train a model as a config in TOML says; the same command goes on with a run that was ended.

    fastattn train config.toml
    fastattn train config.toml training.steps=2000 output.folder=runs/long
    fastattn train config.toml --dry-run        sizes, memory and time, without training
    torchrun --nproc-per-node 8 -m fastattn train config.toml distributed.shard=8

The output folder gets checkpoints, metrics.jsonl, loss.png, and in the end the folder "model", with
the tokenizer, which `fastattn generate`, `fastattn.models.load` and transformers read. Paths in a
config are those that a shell would take, from the current folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from fastattn.chips import peak_flops
from fastattn.cli.train.progress import CLEAR, Progress, Samples, duration, reading
from fastattn.cli.train.reference import reference
from fastattn.training.distributed.parallel import Parallel
from fastattn.training.distributed.processes import Processes, joined
from fastattn.training.optional import require
from fastattn.training.privacy.card import summary
from fastattn.training.privacy.sampling import Sampled
from fastattn.training.runs import toml
from fastattn.training.runs.estimate import estimated, flops_per_token
from fastattn.training.runs.run import MODEL, Prepared, fit, opened, prepare
from fastattn.training.runs.settings import Run
from fastattn.training.sizes import longest_sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a file in TOML")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="table.key=value",
        help="in place of what the file says: training.steps=100",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare tokenizer and data, make two steps, print sizes, memory and time",
    )
    parser.epilog = f"The tables and keys of a config:\n\n{reference()}"


def run(arguments: argparse.Namespace) -> int:
    """Train, or print what training would take; 130 where Ctrl-C ended it."""
    settings = Run.of(toml.overridden(toml.read(arguments.config), arguments.overrides))
    if settings.privacy.enabled and arguments.dry_run:
        raise ValueError(
            "--dry-run measures steps without [privacy] only: add privacy.epsilon=none and "
            "privacy.noise_multiplier=none, or leave --dry-run out"
        )
    _require(settings)
    with (
        joined(settings.model.device, settings.distributed) as processes,
        only_lead_prints(processes),
        opened(settings, processes) as checkpoints,
    ):
        parallel = Parallel(processes, settings.distributed)
        prepared = prepare(settings, checkpoints, parallel, reading)
        samples = Samples(
            prepared.model,
            prepared.objective.tokenizer,
            settings.output.samples,
            settings.output.sample_tokens,
            longest_sequence(prepared.model),
        )
        if sys.stdout.isatty():
            print(CLEAR, end="")
        _print_sizes(prepared)
        if arguments.dry_run:
            if processes.count > 1:
                raise ValueError("--dry-run is for one process; fastattn plan is for several")
            _print_estimate(prepared)
            return 0
        return _fit(prepared, samples)


@contextlib.contextmanager
def only_lead_prints(processes: Processes) -> Iterator[None]:
    """What the other processes print goes nowhere; errors, on stderr, stay."""
    if processes.leads:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _require(settings: Run) -> None:
    """Say whatever package is missing before the work, not after it."""
    for package in ("tokenizers", "safetensors", "matplotlib"):
        require(package, "train", "fastattn train")
    if settings.output.tensorboard:
        require("tensorboard", "tensorboard", "[output] tensorboard")
    if settings.privacy.enabled:
        require("opacus", "privacy", "[privacy]")
    if settings.model.lora_rank:
        require("peft", "lora", "[model] lora_rank")
    if settings.model.library == "transformers":
        transformers = require("transformers", "hf", '[model] library = "transformers"')
        transformers.utils.logging.disable_progress_bar()


def _fit(prepared: Prepared, samples: Samples) -> int:
    config, folder = prepared.run.training, prepared.checkpoints.folder.parent
    progress = Progress(
        config.steps, samples, flops_per_token(prepared.model, config.context), _peak(prepared)
    )
    try:
        history = fit(prepared, [progress])
    finally:
        progress.close()
    if history.interrupted:
        last = prepared.checkpoints.last
        print(f"interrupted after {len(history.steps)} steps; the same command goes on from {last}")
        return 130
    best = history.best if prepared.run.output.best else None
    of = f"after step {history.steps[-1].step}" if best is None else (
        f"after step {best.step}, whose validation loss was the lowest: {best.loss:.4f}"
    )  # fmt: skip
    print(
        f"{history.training_tokens:,} tokens in {duration(history.training_seconds)}, "
        f"{history.tokens_per_second:,.0f} tokens/s"
    )
    print(f"{folder / MODEL}: the model {of}")
    if prepared.privacy is not None:
        print(f"privacy   {summary(prepared.privacy, config.steps)}")
    return 0


def _print_sizes(prepared: Prepared) -> None:
    model, config, training = prepared.model, prepared.run.training, prepared.training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = prepared.parallel.device or next(model.parameters()).device
    print(
        f"model     {type(model).__name__}, {parameters:,} parameters, {trained:,} trained, "
        f"on {device}"
    )
    tokens = int(prepared.examples.lengths.sum())
    held_out = 0 if prepared.validation is None else len(prepared.validation.examples)
    print(
        f"data      {len(prepared.examples):,} examples, {tokens:,} tokens; {held_out:,} examples "
        "to validate"
    )
    epochs = config.steps * config.accumulation / training.per_epoch
    print(f"training  {prepared.objective.name}, {config.steps:,} steps, {epochs:.2f} epochs")
    if prepared.privacy is not None:
        print(f"privacy   at the end: {summary(prepared.privacy, config.steps)}")
        if isinstance(training, Sampled) and training.cut:
            print(f"          {training.cut:,} examples are cut to {training.context} tokens")


def _print_estimate(prepared: Prepared) -> None:
    config = prepared.run.training
    e = estimated(prepared.model, prepared.objective, prepared.training, config)
    total = e.weights + e.optimizer + e.working
    print(
        f"memory    {_size(total)}: weights {_size(e.weights)}, optimiser {_size(e.optimizer)}, "
        f"activations and gradients {_size(e.working)} at the peak of a batch, measured"
    )
    speed = e.tokens / e.seconds
    print(
        f"time      {duration(e.seconds * config.steps)}: {e.seconds:.3g} s a step of {e.tokens:,} "
        f"tokens, {speed:,.0f} tokens/s, by one timed step; validations and checkpoints not counted"
    )
    flops = flops_per_token(prepared.model, config.context)
    if flops is not None:
        peak = _peak(prepared)
        used = "" if peak is None else f", MFU {speed * flops / peak:.1%}"
        print(f"compute   {flops:.3g} FLOPs a token, {flops * speed:.3g} FLOP/s{used}")


def _peak(prepared: Prepared) -> float | None:
    """The operations a second of the chip that the model is on, if it is known."""
    device = next(prepared.model.parameters()).device
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _size(count: float) -> str:
    """Bytes for a reader: "512 B", "3.4 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
