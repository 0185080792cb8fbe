"""A small run that is killed with SIGKILL, again and again, and then goes on to its end.

    python tests/training/checkpoints/killed.py FOLDER --moments 20 --seed 0 --operations 5 9 61

Prints a line for each kill, and exits with 1 if a run that was killed does not end bit for bit as
one that never was: weights, optimiser, averaged weights, record, metrics, the checkpoints kept.
Every run is a fork of this process, which has imported everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from training import small

from fastattn.training import Checkpoints, JsonLines

CONFIG = small.with_changes(
    steps=18, batch_size=2, context=8, accumulation=2, schedule="wsd", warmup_steps=3,
    ema_decay=0.8, evaluation_interval=4,
)  # fmt: skip


def run(folder: Path) -> None:
    """The whole training, which leaves in `folder` the checkpoints, the metrics and the weights."""
    model = small.model(dropout=0.1)
    checkpoints = Checkpoints(folder, every_steps=3, every_minutes=None)
    metrics = JsonLines(folder / "metrics.jsonl")
    small.trained(model, CONFIG, checkpoints=checkpoints, on_progress=metrics)
    weights = {name: w.contiguous() for name, w in model.named_parameters()}
    safetensors.torch.save_file(weights, folder / "final.safetensors")


def result(folder: Path) -> dict[str, Any]:
    """All that the run left, by file; times are no part of it."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): _without_times(path)
        for path in sorted(files)
        if path.name != "manifest.json"  # it hashes the times
    }


def _without_times(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    return _untimed(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def _untimed(content: Any) -> Any:
    if isinstance(content, list):
        return [_untimed(part) for part in content]
    if isinstance(content, dict):
        return {k: _untimed(v) for k, v in content.items() if "second" not in k}
    return content


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """`work` in a fork, killed after so many seconds; 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_operation(number: int, folder: Path) -> None:
    """The run, killed right before operation `number` on the files of checkpoints, from 0."""
    count = itertools.count()

    def operation(*_: Any) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if writes and "step-" in str(arguments[0]):
            operation()

    save = safetensors.torch.save_file
    safetensors.torch.save_file = lambda *a, **kw: (operation(), save(*a, **kw))[1]
    os.fsync = operation
    sys.addaudithook(audit)
    run(folder)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=0, help="kills after a random time")
    parser.add_argument(
        "--operations", type=int, nargs="*", default=(), help="kills before these of a save's"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    # A killed process loses nothing that the kernel has: only a machine that stops needs this.
    os.fsync = lambda file: None

    run(arguments.folder / "whole")
    expected = result(arguments.folder / "whole")
    shutil.rmtree(arguments.folder / "whole")
    start = time.perf_counter()
    assert forked(lambda: run(arguments.folder / "again")) == 0
    seconds = 0.8 * (time.perf_counter() - start)  # the first fork is the slowest one
    wrong = [] if result(arguments.folder / "again") == expected else ["a run is not repeatable"]

    def checked(name: str, folder: Path, code: int, finished: bool) -> None:
        steps = Checkpoints(folder).steps()
        codes = [code, forked(lambda: run(folder))]
        got = result(folder)
        differs = [file for file in {**expected, **got} if got.get(file) != expected.get(file)]
        how = f"DIFFERS in {', '.join(differs)}" if differs else "the same bits"
        at = f"step {steps[-1]}" if steps else "the start"
        print(f"killed {name}, went on from {at}: exit codes {codes}, {how}", flush=True)
        if differs or codes not in ([-signal.SIGKILL, 0], [0, 0][: 2 * finished]):
            wrong.append(name)
        shutil.rmtree(folder)

    for number in range(arguments.moments):
        folder, moment = arguments.folder / f"moment-{number}", random.random() * seconds
        code = forked(lambda: run(folder), moment)  # noqa: B023
        checked(f"after {1e3 * moment:.0f} ms", folder, code, finished=True)
    for number in arguments.operations:
        folder = arguments.folder / f"operation-{number}"
        code = forked(lambda: killed_at_operation(number, folder))  # noqa: B023
        checked(f"before file operation {number}", folder, code, finished=False)
    print(f"{len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
