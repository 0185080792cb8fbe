"""Checkpoints: folders from which a run that was killed at any moment goes on, bit for bit.

    FOLDER/
        .lock                     held by the process that trains
        step-000000/              before the first step: whatever hinders a save is found there
        step-001500/
            model/                for use: a folder of the weights that are evaluated
            *.safetensors         to go on: trained parameters and buffers, the optimisers' tensors,
                                  the averaged weights; a file for each process
            state.json            step, record, scalars, and the run's fingerprint
            manifest.json         size and SHA-256 of each file

A checkpoint is written under another name, made durable file by file, the manifest last, and then
renamed: a folder `step-*` is whole, or was damaged later, which its manifest shows. Their order is
that of the numbers in their names; no clock is asked.

The state is copied, and written by a thread while training goes on. Several processes write their
parts of one checkpoint, which any other number of processes reads: all of them must see the folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.files import local_path, read_json
from fastattn.nn.checks import check_integer, check_number
from fastattn.training.checkpoints import durable, tensors
from fastattn.training.checkpoints.beside import Beside
from fastattn.training.checkpoints.lock import Lock
from fastattn.training.checkpoints.model import gathered, save_model
from fastattn.training.distributed.processes import Processes
from fastattn.training.fingerprints import as_json, difference
from fastattn.training.optional import require
from fastattn.training.steps.config import TrainingConfig
from fastattn.training.steps.state import TrainingState

FORMAT = 2  # of the files in a checkpoint
STATE = "state.json"
SAVE_MINUTES = 30.0  # that one process may take longer than another to write or read its part
LOST_SECONDS = 30.0  # that a save is waited for where the run has failed
NAME = re.compile(r"step-(\d{6,})")
UNFINISHED = ".unfinished-"  # being written, or being removed


class Checkpoints:
    """The checkpoints of a run in one folder, which `train` writes and goes on from.

        checkpoints = Checkpoints("runs/poems", every_minutes=10)
        train(model, objective, batches, config, checkpoints=checkpoints)

    One is written before the first step and after the last, at the intervals, and after a
    validation that is the best so far. Kept are the last `keep` and the best.

    Used as a context, it keeps other processes out of the folder; `train` does so by itself.

    Args:
        folder: of this run and no other; made if it is not there.
        every_steps, every_minutes: after which a checkpoint is due; None for never.
        keep: how many of the last ones to keep, at least 1.
        save_model: writes `model/`, called with the model and a path that is not there.
        fingerprint: of whatever else makes the run, as its tokenizer and its data: JSON.
        asynchronous: whether training goes on while a checkpoint is written, from a copy of the
            state in the memory of the CPU. One at a time: the next waits for the last, and raises
            its error.
        processes: of a run on several, all of which call the same methods; the first has the lock.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 10.0,
        keep: int = 2,
        save_model: Callable[[torch.nn.Module, Path], None] = save_model,
        fingerprint: Mapping[str, Any] | None = None,
        asynchronous: bool = True,
        processes: Processes | None = None,
    ) -> None:
        self.folder = local_path("folder", folder)
        if every_steps is not None:
            check_integer("every_steps", every_steps, at_least=1, otherwise=" or None")
        if every_minutes is not None and check_number("every_minutes", every_minutes) <= 0:
            raise ValueError(f"every_minutes must be positive or None, got {every_minutes}")
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep = check_integer("keep", keep, at_least=1)
        self.fingerprint = dict(fingerprint or {})
        self.asynchronous = asynchronous
        self.processes = processes or Processes("auto")
        self._writers = self.processes  # who have a group for the thread that writes
        self._save_model = save_model
        self._lock = Lock(self.folder, self.processes)
        self._entered = 0
        self._saved_at = time.monotonic()
        self._last: int | None = None  # that is on the disk
        self._newest: int | None = None  # that is, or is being written
        self._beside = Beside()

    def __enter__(self) -> Checkpoints:
        """Lock the folder, by the first process.

        Raises:
            RuntimeError: another run has it.
            OSError: it cannot be made or written to.
        """
        if self._entered == 0:
            self._lock.acquire()
        self._entered += 1
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            # Another process may be lost, for which the one being written would wait.
            hurry = error is not None and self.processes.count > 1
            self._beside.join(LOST_SECONDS if hurry else None)
            self._lock.release()

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:06}"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, in order."""
        if not self.folder.is_dir():
            return []
        names = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    @property
    def last(self) -> Path | None:
        """The checkpoint that this run wrote last or went on from; None before.

        One that is being written is waited for.
        """
        self._beside.join()
        return self._last_whole()

    def has(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is the newest that this run has or writes."""
        return self._newest == step

    def due(self, step: int) -> bool:
        """Whether an interval has passed, or the last save has failed, which `save` says."""
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        by_minutes = self.every_minutes is not None and minutes >= self.every_minutes
        return by_steps or by_minutes or self._beside.failed

    def wait(self) -> None:
        """Wait until what is being written is on the disk.

        Raises:
            OSError: it could not be written. Those that are there stay, and are named.
        """
        self._beside.wait()

    def restore(
        self, state: TrainingState, fingerprint: Mapping[str, Any], config: TrainingConfig
    ) -> bool:
        """Go on from the last good checkpoint; False if there is none. All processes must call it.

        Of the fingerprint, only the number of steps may differ, if `config` extends the run.

        Whatever a killed save left is removed. A damaged checkpoint is passed over with a warning,
        and renamed.

        Raises:
            ValueError: the last good one is of another run or version; the message names the key.
            RuntimeError: the processes do not see the same folder.
        """
        self._beside.join()  # of a run before, in the same context
        self._beside = Beside()
        self._lock.check_shared()
        if self.processes.count > 1:
            self._writers = Processes("cpu", timedelta(minutes=SAVE_MINUTES))
        processes = self._writers
        processes.together(self._remove_unfinished)
        self._saved_at = time.monotonic()
        for step in reversed(processes.gathered(self.steps())[0]):
            path = self.path(step)
            damage = durable.damage(path, processes)
            if damage is None:
                self._load(path, state, fingerprint, config)
                self._last = self._newest = step
                return True
            processes.together(functools.partial(self._pass_over, path, damage))
        return False

    def save(self, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
        """Write a checkpoint of `state`, then remove those that are no longer kept.

        The first one of a run is on the disk when this returns, and each where not `asynchronous`;
        others are being written. All processes must call it.

        Raises:
            OSError: it, or the one before, could not be written. Those that are there stay, and are
                named.
        """
        self.wait()
        processes, step = self._writers, state.step
        beside = self.folder / f"{UNFINISHED}{self.path(step).name}"
        content = {**state.scalars(), "fingerprint": as_json(fingerprint), "format": FORMAT}
        best = None if state.history.best is None else state.history.best.step

        def model_written() -> None:
            if processes.leads:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                parameters = state.model.parameters()
                with self.processes.patient(sum(parameter.nbytes for parameter in parameters)):
                    self._save_model(state.model, beside / "model")

        with self._writing(step, beside):
            with state.evaluated(), gathered(state.model, keep=processes.leads):
                processes.together(model_written)
            values = state.tensors()
            if self.asynchronous:
                values = tensors.copied(values)

        def rest_written() -> None:
            with self._writing(step, beside):
                with self.processes.patient(tensors.local_bytes(values)):
                    tensors.write(values, beside, processes)
                processes.together(lambda: self._finished(beside, content))
                durable.seal(beside, processes)
                processes.together(lambda: self._named(beside, step, best))
            self._last = step

        first, self._newest = self._last is None, step
        self._saved_at = time.monotonic()
        self._beside.start(rest_written)
        if first or not self.asynchronous:
            self.wait()

    def _last_whole(self) -> Path | None:
        return None if self._last is None else self.path(self._last)

    def _remove_unfinished(self) -> None:
        if self.processes.leads:
            for left in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left)

    def _pass_over(self, path: Path, damage: str) -> None:
        if self.processes.leads:
            aside = self.folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            warnings.warn(
                f"passing over the checkpoint {path}: {damage}. It is {aside.name} now",
                stacklevel=4,
            )

    def _load(
        self,
        path: Path,
        state: TrainingState,
        fingerprint: Mapping[str, Any],
        config: TrainingConfig,
    ) -> None:
        """Take over what a good checkpoint has, if it is of this run."""

        def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
            content = read_json(path / STATE, finite=False)
            saved = content["fingerprint"]
            if config.extends(saved["training"]["steps"], content["step"]):
                saved["training"]["steps"] = config.steps
            differs = difference(saved, as_json(fingerprint))
            if differs is not None:
                raise ValueError(
                    f"{self.folder} has checkpoints of another run: {differs}. Set it back to go "
                    "on, or give this run a folder of its own"
                )
            if content.get("format") != FORMAT:
                raise ValueError(
                    f"{path} was written by another version of fastattn: go on with that, or "
                    f"start again in another folder, from the weights in {path / 'model'}"
                )
            return content, state.empty(tensors.described(path))

        unread = require("safetensors", "train", "a checkpoint").SafetensorError
        try:
            content, values = self._writers.together(read)
            tensors.read(path, values, self._writers)
            state.load(values, content)
        except (KeyError, TypeError, AttributeError, unread) as error:
            raise ValueError(f"{path} is no checkpoint of this run: {error!r}") from error

    @contextlib.contextmanager
    def _writing(self, step: int, beside: Path) -> Iterator[None]:
        """Of an error the message, and nothing left of the checkpoint."""
        # How safetensors says that a disk is full.
        unwritten = require("safetensors", "train", "a checkpoint").SafetensorError
        try:
            yield
        except BaseException as error:
            self._newest = self._last
            if self.processes.leads:
                shutil.rmtree(beside, ignore_errors=True)
            if not isinstance(error, (OSError, unwritten)):
                raise
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({reason}); the last good one is {self._last_whole() or 'none'}. Make "
                "room there and start the run again: it goes on from the last good one"
            ) from error

    def _finished(self, beside: Path, content: dict[str, Any]) -> None:
        if self.processes.leads:
            (beside / STATE).write_text(json.dumps(content), encoding="utf-8")

    def _named(self, beside: Path, step: int, best: int | None) -> None:
        """Give a sealed checkpoint its name, and remove those that are no longer kept."""
        if not self.processes.leads:
            return
        durable.rename(beside, self.path(step))
        for old in self.steps()[: -self.keep]:
            if old != best:
                # Should the process die meanwhile, no part of it keeps its name.
                doomed = self.folder / f"{UNFINISHED}{self.path(old).name}-removed"
                self.path(old).rename(doomed)
                shutil.rmtree(doomed)
