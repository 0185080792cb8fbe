"""Distillation: the next token as a larger model sees it (Hinton et al. 2015, arXiv:1503.02531).

    p, q    softmax(logits / temperature) of the teacher and of the student
    loss    alpha * temperature^2 * KL(p || q) + (1 - alpha) * the causal loss

The factor temperature^2 keeps the size of the gradient, whatever the temperature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.models import load
from fastattn.nn.checks import check_within
from fastattn.ops.common import modes
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training.contract import Batch, Interface
from fastattn.training.objectives.causal import Causal, CausalSettings
from fastattn.training.optional import require
from fastattn.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class DistillationSettings(CausalSettings):
    """How a causal language model learns from another.

    Attributes:
        field: of a record, the text.
        teacher: the folder of the other model, with its tokenizer, whose vocabulary must be the
            same; transformers reads it where it reads the student, else fastattn.
        temperature: by which the logits of both are divided.
        alpha: the weight of the teacher, from 0 to 1; 1 - alpha is the texts' own.
    """

    teacher: str = ""
    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, str) or not self.teacher:
            raise ValueError(f"teacher must be the folder of a model, got {self.teacher!r}")
        check_within("temperature", self.temperature, "(0, inf)", "positive and finite")
        check_within("alpha", self.alpha, "[0, 1]")


class Distillation(Causal):
    """The next token of a text, and how a teacher would have it."""

    name = "distillation"
    settings_class = DistillationSettings

    def _derive(self) -> None:
        """Read the teacher.

        Raises:
            FileNotFoundError, ValueError: the folder holds no model, or no tokenizer, or one with
                another vocabulary.
        """
        folder = self.settings.teacher
        theirs = Tokenizer.load(folder)
        if theirs.vocabulary != self.tokenizer.vocabulary:
            raise ValueError(
                f"the teacher {folder} has another vocabulary, of {theirs.vocab_size} tokens, than "
                f"the student, of {self.tokenizer.vocab_size}: take its tokenizer for the student"
            )
        self.teacher = _frozen(folder, self.interface)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The weighted sum, a mean over the targets that count."""
        divergence, own = self._losses(model, batch)
        return self.settings.alpha * divergence + (1 - self.settings.alpha) * own

    def observe(self, model: torch.nn.Module, batch: Batch) -> Any:
        losses = [loss.item() for loss in self._losses(model, batch)]
        return (losses if batch.counted else [0.0, 0.0]), batch.counted

    def conclude(self, observed: Iterable[Any]) -> dict[str, float]:
        """The loss, its parts "divergence" and "cross_entropy", and the latter's perplexity."""
        both = [*observed]
        parts = [super(Distillation, self).conclude((x[i], n) for x, n in both) for i in (0, 1)]
        divergence, own = (part["loss"] for part in parts)
        loss = self.settings.alpha * divergence + (1 - self.settings.alpha) * own
        return {**parts[1], "loss": loss, "divergence": divergence, "cross_entropy": own}

    def _losses(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """temperature^2 * KL(teacher || student), and the student's causal loss."""
        arguments = dict(batch.arguments)
        if self.interface == "fastattn":
            arguments["keep_logits"] = True
            logits, own = model(**arguments)
            counts = arguments.pop("targets") != IGNORED
        else:
            output = model(**arguments)
            logits, own = output.logits, output.loss
            counts = F.pad(arguments.pop("labels")[:, 1:], (0, 1), value=IGNORED) != IGNORED
        with torch.no_grad():
            expected = self.teacher.to(logits.device)(**arguments)
        expected = getattr(expected, "logits", expected)
        if expected.shape != logits.shape:
            raise ValueError(
                f"the teacher has logits of {expected.shape[-1]} tokens, the student of "
                f"{logits.shape[-1]}: give the student's config the same vocab_size"
            )
        divergence = F.kl_div(
            self._log_probabilities(logits[counts]),
            self._log_probabilities(expected[counts]),
            log_target=True,
            reduction="batchmean",
        )
        return self.settings.temperature**2 * divergence, own

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        wide = logits.to(modes.at_least_float32(logits.dtype))
        return F.log_softmax(wide / self.settings.temperature, -1)


def _frozen(folder: str, interface: Interface) -> torch.nn.Module:
    """The causal model of a folder in eval mode, its weights without gradients."""
    if interface == "fastattn":
        model: Any = load(folder)
    else:
        require("transformers", "hf", "a teacher of transformers")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True
        )
        fastattn.accelerate(model)
    model.requires_grad_(False)
    frozen: torch.nn.Module = model.eval()
    return frozen
