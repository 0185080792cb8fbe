"""Train a small GPT, then run transformers' models on fastattn: a Llama, that GPT, a GPT-2.

Everything that it makes goes to a folder: the model and its tokenizer, which transformers reads
too, the record of the training, the loss curve, and what was measured. It takes some minutes on
two CPU cores; on a GPU the same command runs the Triton kernels.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

import fastattn
from fastattn.cli.demo import pretrained, swapped, trained
from fastattn.files import write_text
from fastattn.training.optional import require
from fastattn.training.runs.building import device_named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--steps", type=int, help=f"training steps, default: {trained.FULL.steps}")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device", default="auto", help='"cpu", "cuda", "cuda:1"; default: a GPU if there is one'
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, a part of the text and no pretrained model, in seconds",
    )


def run(arguments: argparse.Namespace) -> int:
    """The whole demo; RuntimeError if a result is not what it is promised to be."""
    # Whatever is missing is said before the work, not after it.
    for package in ("tokenizers", "matplotlib"):
        require(package, "train", "the demo")
    require("transformers", "hf", "the demo").utils.logging.disable_progress_bar()
    device = device_named(arguments.device)
    size = trained.QUICK if arguments.quick else trained.FULL
    config = trained.configuration(size, arguments.steps, arguments.seed, device)
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"fastattn {fastattn.__version__}, torch {torch.__version__}, {device}{threads}")

    print("\n1. A small GPT, trained on the texts that ship with fastattn")
    result = trained.show(folder, size, config, device)
    if result is None:
        return 130

    comparisons = []
    print("\n2. A pretrained Llama of transformers: SmolLM2-135M-Instruct")
    if arguments.quick:
        print("   left out by --quick")
    elif (missing := pretrained.missing()) is not None:
        print(f"   left out: {missing}")
    else:
        comparisons.append(pretrained.show(device))

    swapped.save_gpt2(folder / "gpt2", folder)
    for title, where in (
        ("3. The small GPT, which transformers reads as a Qwen 3", folder),
        ("4. A GPT-2 of transformers, of that size, with random weights", folder / "gpt2"),
    ):
        print(f"\n{title}")
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
            comparisons.append(
                swapped.show(where, result.batch, size.new_tokens, size.seconds, dtype, device)
            )

    measured = {
        "bits_per_byte": result.bits_per_byte,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    write_text(folder / "measured.json", json.dumps(measured, indent=1) + "\n")
    print(f"\nIn {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"Took {time.perf_counter() - started:.0f} s.")
    return 0
