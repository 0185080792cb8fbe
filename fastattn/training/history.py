"""The record of a training run: losses, learning rates and speed, as data, JSON and a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from fastattn.files import local_path, write_text, written_beside
from fastattn.training.optional import require


@dataclass(frozen=True)
class Step:
    """One optimiser step, counted from 1; `loss` is that of its batch before the update."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Evaluation:
    """The mean validation loss after `step` optimiser steps."""

    step: int
    loss: float


@dataclass
class History:
    """The record of a run. Losses are in nats per token.

    Attributes:
        steps: one entry per optimiser step.
        evaluations: the validation losses: before the first step, in between, and after the last.
        training_tokens: how many tokens the steps went over.
        training_seconds: how long the steps took, evaluations not counted.
        interrupted: whether Ctrl-C ended the run early.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    training_tokens: int = 0
    training_seconds: float = 0.0
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Measured training speed; 0 before the first step."""
        return self.training_tokens / self.training_seconds if self.training_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote."""
        content = json.loads(local_path("path", path).read_text(encoding="utf-8"))
        return cls(
            steps=[Step(**step) for step in content["steps"]],
            evaluations=[Evaluation(**evaluation) for evaluation in content["evaluations"]],
            training_tokens=content["training_tokens"],
            training_seconds=content["training_seconds"],
            interrupted=content["interrupted"],
        )

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
            label="training, one batch a step",
        )
        axes.plot(
            [evaluation.step for evaluation in self.evaluations],
            [evaluation.loss for evaluation in self.evaluations],
            marker="o",
            label="validation",
        )
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        with written_beside(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
