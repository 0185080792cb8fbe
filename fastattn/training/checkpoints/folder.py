"""Checkpoints: folders from which a run that was killed at any moment goes on, bit for bit.

    FOLDER/
        .lock                     held by the process that trains
        step-000000/              before the first step: whatever hinders a save is found there
        step-001500/
            model/                for use: a folder of the weights that are evaluated
            weights.safetensors   to go on: the trained parameters and the buffers
            state.safetensors     the optimisers' tensors, the averaged weights
            state.json            step, record, scalars, and the run's fingerprint
            manifest.json         size and SHA-256 of each file

A checkpoint is written under another name, made durable file by file, the manifest last, and then
renamed: a folder `step-*` is whole, or was damaged later, which its manifest shows. Their order is
that of the numbers in their names; no clock is asked.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastattn.files import local_path, read_json
from fastattn.nn.checks import check_integer, check_number
from fastattn.training.checkpoints import durable
from fastattn.training.distributed.processes import Processes
from fastattn.training.fingerprints import as_json, difference
from fastattn.training.optional import require
from fastattn.training.steps.state import TrainingState

NAME = re.compile(r"step-(\d{6,})")
UNFINISHED = ".unfinished-"  # being written, or being removed


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write `model` by its own `save_pretrained`, or its `state_dict` as model.safetensors."""
    own: Any = getattr(model, "save_pretrained", None)
    if own is not None:
        own(folder)
        return
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:  # a shared one once
            seen.add(id(value))
            weights[name] = value
    folder.mkdir()
    save_tensors(weights, folder / "model.safetensors")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device and strides."""
    safetensors = require("safetensors.torch", "train", "a checkpoint")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.save_file(plain, path)


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
        processes: of a run on several; rank 0 has the lock.

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
        self.processes = processes or Processes("auto")
        self._save_model = save_model
        self._lock: int | None = None
        self._entered = 0
        self._saved_at = time.monotonic()
        self._last: int | None = None

    def __enter__(self) -> Checkpoints:
        """Lock the folder.

        Raises:
            RuntimeError: another run has it.
            OSError: it cannot be made or written to.
        """
        if self._entered == 0 and self.processes.leads:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise OSError(
                    f"checkpoints cannot be written to {self.folder} ({error.strerror}): give a "
                    "folder that can be made and written to"
                ) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise RuntimeError(
                    f"another run is training in {self.folder}: wait for it or stop it, or give "
                    "this one a folder of its own"
                ) from None
            self._lock = lock
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._entered == 0 and self._lock is not None:
            os.close(self._lock)  # which unlocks it, as the end of the process does
            self._lock = None

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
        """The checkpoint that this run wrote last or went on from; None before."""
        return None if self._last is None else self.path(self._last)

    def has(self, step: int) -> bool:
        """Whether this run has a checkpoint after `step` steps, the last one that it has."""
        return self._last == step

    def due(self, step: int) -> bool:
        """Whether an interval has passed."""
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        return by_steps or (self.every_minutes is not None and minutes >= self.every_minutes)

    def restore(self, state: TrainingState, fingerprint: Mapping[str, Any]) -> bool:
        """Go on from the last good checkpoint; False if there is none.

        Whatever a killed save left is removed. A damaged checkpoint is passed over with a warning,
        and renamed.

        Raises:
            ValueError: the last good one is of another run, and the message names the key; or its
                files are whole and no checkpoint's.
        """
        for left in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left)
        self._saved_at = time.monotonic()
        for step in reversed(self.steps()):
            path = self.path(step)
            if (damage := durable.damage(path)) is not None:
                aside = self.folder / f"damaged-{path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                warnings.warn(
                    f"passing over the checkpoint {path}: {damage}. It is {aside.name} now",
                    stacklevel=2,
                )
                continue
            unread = require("safetensors", "train", "a checkpoint").SafetensorError
            load_file = require("safetensors.torch", "train", "a checkpoint").load_file
            try:
                content = read_json(path / "state.json", finite=False)
                differs = difference(content["fingerprint"], as_json(fingerprint))
                weights = load_file(path / "weights.safetensors")
                tensors = load_file(path / "state.safetensors")
            except (KeyError, TypeError, OSError, unread) as error:
                raise ValueError(f"{path} is no checkpoint: {error!r}") from error
            if differs is not None:
                raise ValueError(
                    f"{self.folder} has checkpoints of another run: {differs}. Set it back to go "
                    "on, or give this run a folder of its own"
                )
            try:
                state.load(weights, tensors, content)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{path} is no checkpoint of this model: {error!r}") from error
            self._last = step
            return True
        return False

    def save(self, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
        """Write a checkpoint of `state`, then remove those that are no longer kept.

        Raises:
            OSError: it could not be written. Those that are there stay, and are named.
        """
        # How safetensors says that a disk is full.
        unwritten = require("safetensors", "train", "a checkpoint").SafetensorError
        target = self.path(state.step)
        beside = self.folder / f"{UNFINISHED}{target.name}"
        content = {**state.scalars(), "fingerprint": as_json(fingerprint)}
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            with state.evaluated():
                self._save_model(state.model, beside / "model")
            save_tensors(state.weights(), beside / "weights.safetensors")
            save_tensors(state.tensors(), beside / "state.safetensors")
            (beside / "state.json").write_text(json.dumps(content), encoding="utf-8")
            durable.seal(beside)
            durable.rename(beside, target)
        except (OSError, unwritten) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"the checkpoint of step {state.step} could not be written to {self.folder} "
                f"({reason}); the last good one is {self.last or 'none'}. Make "
                "room there and start the run again: it goes on from the last good one"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self._last, self._saved_at = state.step, time.monotonic()
        best = state.history.best
        for step in self.steps()[: -self.keep]:
            if best is None or step != best.step:
                # Should the process die meanwhile, no part of it keeps its name.
                doomed = self.folder / f"{UNFINISHED}{self.path(step).name}-removed"
                self.path(step).rename(doomed)
                shutil.rmtree(doomed)
