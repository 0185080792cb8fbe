"""The record of a training run: losses, learning rates and speed, as data, JSON and a picture.

`JsonLines` and `TensorBoard` are callbacks of `train` that write it down while it grows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastattn.files import local_path, read_json, write_text, written_beside
from fastattn.training.optional import require


@dataclass(frozen=True)
class Step:
    """One optimiser step, counted from 1.

    Attributes:
        loss: of its batches, before the update.
        gradient_norm: before it is scaled down; infinity for a step of float16 that was left out,
            because the scaled loss was too large.
        tokens: that the model read.
        seconds: that the step took. Two records are equal whatever this is.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float = field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """As JSON, which has no infinity."""
        finite = math.isfinite(self.gradient_norm)
        return {**vars(self), "gradient_norm": self.gradient_norm if finite else None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Step:
        """The step of which `as_dict` gave `content`."""
        norm = content["gradient_norm"]
        return cls(**{**content, "gradient_norm": math.inf if norm is None else norm})


@dataclass(frozen=True)
class Evaluation:
    """A validation after `step` optimiser steps.

    Attributes:
        loss: the mean over the targets.
        scores: what else the objective measures, by name.
    """

    step: int
    loss: float
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass
class History:
    """The record of a run. Losses are in nats per target.

    Attributes:
        steps: one entry per optimiser step.
        evaluations: the validations: before the first step, in between, and after the last.
        training_tokens: how many tokens the steps went over.
        training_seconds: how long the steps took, evaluations and checkpoints not counted.
        interrupted: whether Ctrl-C ended the run early.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    training_tokens: int = 0
    training_seconds: float = field(default=0.0, compare=False)
    interrupted: bool = False

    def add(self, step: Step) -> None:
        """Append a step and count its tokens and seconds."""
        self.steps.append(step)
        self.training_tokens += step.tokens
        self.training_seconds += step.seconds

    @property
    def tokens_per_second(self) -> float:
        """Measured training speed; 0 before the first step."""
        return self.training_tokens / self.training_seconds if self.training_seconds else 0.0

    @property
    def best(self) -> Evaluation | None:
        """The validation with the lowest loss, the first of equal ones; None before there is one.

        A loss that is no number is never the best.
        """
        numbers = [evaluation for evaluation in self.evaluations if not math.isnan(evaluation.loss)]
        return min(numbers, key=lambda evaluation: evaluation.loss, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON."""
        return {
            "steps": [step.as_dict() for step in self.steps],
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "interrupted": self.interrupted,
            "training_tokens": self.training_tokens,
            "training_seconds": self.training_seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> History:
        """The record of which `as_dict` gave `content`."""
        return cls(
            steps=[Step.from_dict(step) for step in content["steps"]],
            evaluations=[Evaluation(**evaluation) for evaluation in content["evaluations"]],
            training_tokens=content["training_tokens"],
            training_seconds=content["training_seconds"],
            interrupted=content["interrupted"],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote; ValueError, naming the file, for anything else."""
        file = local_path("path", path)
        content = read_json(file, finite=False)
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: no record of a run ({error!r})") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the training and validation loss over the steps, as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        require("matplotlib", "train", "the loss curve")
        # The object interface with its own canvas: no window system, no global state of pyplot.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(
            [step.step for step in self.steps],
            [step.loss for step in self.steps],
            linewidth=0.8,
            alpha=0.6,
            label="training, of each step",
        )
        axes.plot(
            [evaluation.step for evaluation in self.evaluations],
            [evaluation.loss for evaluation in self.evaluations],
            marker="o",
            label="validation",
        )
        axes.set(xlabel="step", ylabel="loss (nats per target)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        with written_beside(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


class JsonLines:
    """A callback of `train` that writes a line of JSON for each step and each validation.

        train(..., on_progress=JsonLines("run/metrics.jsonl"))

        {"kind": "step", "step": 1, "loss": 8.32, "learning_rate": 5e-05, ...}
        {"kind": "evaluation", "step": 50, "loss": 5.91, "scores": {"perplexity": 368.7}}

    The first call writes the file again, so that after a crash it has what the run goes on from:
    no line twice, and none that is cut. A line is in the file as soon as it is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path("path", path)
        self._news = _News()

    def __call__(self, history: History) -> None:
        first = self._news.steps + self._news.evaluations == 0
        text = "".join(
            json.dumps(
                {"kind": "step", **entry.as_dict()}
                if isinstance(entry, Step)
                else {"kind": "evaluation", **asdict(entry)}
            )
            + "\n"
            for entry in self._news.of(history)
        )
        if first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if first or text:
            with open(self.path, "w" if first else "a", encoding="utf-8") as file:
                file.write(text)


class TensorBoard:
    """A callback of `train` that writes for TensorBoard: training, validation, learning rate.

        train(..., on_progress=TensorBoard("run/tensorboard"))

    The first call writes all again and hides what the folder had, so that a run which goes on after
    a crash has no step twice.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require("tensorboard", "tensorboard", "writing for TensorBoard")
        self.folder = local_path("folder", folder)
        self._writer: Any = None
        self._news = _News()

    def __call__(self, history: History) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=0)
        for entry in self._news.of(history):
            if isinstance(entry, Step):
                self._writer.add_scalar("loss/training", entry.loss, entry.step)
                self._writer.add_scalar("learning_rate", entry.learning_rate, entry.step)
                self._writer.add_scalar("gradient_norm", entry.gradient_norm, entry.step)
                speed = entry.tokens / entry.seconds
                self._writer.add_scalar("tokens_per_second", speed, entry.step)
                continue
            self._writer.add_scalar("loss/validation", entry.loss, entry.step)
            for name, score in entry.scores.items():
                self._writer.add_scalar(f"validation/{name}", score, entry.step)
            self._writer.flush()

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()


class _News:
    """The entries of a growing record that were not there the last time."""

    def __init__(self) -> None:
        self.steps = self.evaluations = 0

    def of(self, history: History) -> list[Step | Evaluation]:
        """The new entries by their steps; a step comes before the validation after it."""
        entries: list[Step | Evaluation] = [
            *history.steps[self.steps :],
            *history.evaluations[self.evaluations :],
        ]
        self.steps, self.evaluations = len(history.steps), len(history.evaluations)
        return sorted(entries, key=lambda entry: entry.step)  # a stable sort
