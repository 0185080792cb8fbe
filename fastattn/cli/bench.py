"""Run the benchmarks of a checkout: peers side by side, ceilings in the same run.

    fastattn bench                          what there is to measure
    fastattn bench attention --preset full  one subject; its own options follow, --help lists them
    fastattn bench all                      every subject, one after another, with one preset

The scripts are the files of benchmarks/ in the checkout that is installed (`pip install -e .`); a
wheel does not have them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SUBJECTS = {
    "attention": "attention against SDPA's backends, FlexAttention, flash-attn, xformers",
    "decode": "attention on a cache of keys and values, contiguous and paged",
    "layer_norm": "layer_norm and rms_norm",
    "ffn": "the feed-forward against eager PyTorch and the bare matrix products",
    "cross_entropy": "cross_entropy and linear_cross_entropy against eager PyTorch and Liger",
    "rotary": "rotary against the formula in eager PyTorch and Liger",
    "gpt_train": "a training step of GPT-2 against transformers and nanoGPT's recipe",
    "train": "the parts of a training run: steps, packing, shards, checkpoints",
    "gpt_generate": "generation of GPT-2 against transformers and gpt-fast's recipe",
    "memory": "peak memory and what is kept for the backward",
    "never_slower": "every op over a grid of shapes: is any slower than eager PyTorch?",
    "overhead": "what a call costs on the host",
}
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", nargs="?", choices=[*SUBJECTS, ALL], help="what to measure")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="of the subject's script, e.g. --preset full"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the scripts that were asked for; the worst of their exit codes."""
    if arguments.subject is None:
        width = max(map(len, SUBJECTS))
        for name, what in SUBJECTS.items():
            print(f"{name:<{width}}  {what}")
        print(f"\nfastattn bench SUBJECT [options], or {ALL}; fastattn bench SUBJECT --help")
        return 0
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / "script.py").is_file():
        raise FileNotFoundError(
            f"there are no benchmarks at {folder}: they come with a checkout. Clone the "
            "repository, run `pip install -e .` in it, and try again"
        )
    codes = []
    for name in SUBJECTS if arguments.subject == ALL else [arguments.subject]:
        if arguments.subject == ALL:
            print(f"== {name}", flush=True)
        command = [sys.executable, str(folder / f"{name}.py"), *arguments.options]
        codes.append(subprocess.call(command))
    # 1 (wrong) says more than 2 (could not begin) and 3 (left something out).
    return min((code for code in codes if code), default=0)
