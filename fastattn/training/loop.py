"""The training loop: AdamW, warm-up and cosine, clipped gradients, validation, measured speed.

    history = train(model, split.training, split.validation, TrainingConfig(steps=300))

A model is anything that is called as `model(inputs, targets) -> (logits, loss)`; the data are token
streams. The loop knows nothing of files, progress bars or folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fastattn.training.data import check_stream, consecutive_batches, sample_batch
from fastattn.training.history import Evaluation, History, Step

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences a step.
        context: tokens a sequence.
        learning_rate: the peak, reached after the warm-up.
        final_learning_rate: what the cosine ends at.
        warmup_steps: steps over which the rate rises linearly from 0.
        weight_decay: of matrices and embeddings; biases and norms have none.
        betas: AdamW's.
        max_gradient_norm: gradients are scaled down to this norm; infinity never scales.
        evaluation_interval: steps between two validations.
        evaluation_tokens: how many tokens of the validation stream to use at most, from its start.
        precision: "bfloat16" runs under autocast; "auto" is that on CUDA and "float32" elsewhere.
        seed: of the order of the batches.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    steps: int
    batch_size: int = 8
    context: int = 128
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    evaluation_interval: int = 50
    evaluation_tokens: int = 16384
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "evaluation_interval", "evaluation_tokens"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        rate, final = self.learning_rate, self.final_learning_rate
        _check("learning_rate", rate, 0 < rate < math.inf, "positive and finite")
        _check("final_learning_rate", final, 0 <= final <= rate, f"in [0, learning_rate={rate:g}]")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        valid = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check("betas", self.betas, valid, "two numbers in [0, 1)")
        _check("max_gradient_norm", self.max_gradient_norm, self.max_gradient_norm > 0, "positive")
        _check("precision", self.precision, self.precision in PRECISIONS, f"one of {PRECISIONS}")

    def learning_rate_at(self, step: int) -> float:
        """The rate of optimiser step `step`, counted from 1 to `steps`."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.final_learning_rate + cosine * (self.learning_rate - self.final_learning_rate)


def _check(name: str, value: object, valid: bool, accepted: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {accepted}; got {value!r}")


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's parameter groups: what has two dimensions or more decays, vectors do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: torch.nn.Module,
    training: torch.Tensor,
    validation: torch.Tensor,
    config: TrainingConfig,
    on_progress: Callable[[History], None] | None = None,
) -> History:
    """Train `model` in place, on its own device, and return the record.

    The same model, data, config and number of threads give the same bits on a CPU. Dropout draws
    from torch's global generator. Ctrl-C ends the run: the model stays usable, with the steps made
    so far, and the record says `interrupted`.

    Args:
        model: called as `model(inputs (B, T), targets (B, T)) -> (logits, loss)`.
        training, validation: token streams, (N,) int64.
        config: how.
        on_progress: called after each step and each validation with the record so far.

    Raises:
        ValueError: a stream is shorter than context + 1 tokens.
        FloatingPointError: the loss is no longer finite; the message says at which step.
    """
    check_stream(training, config.context, "training")
    check_stream(validation, config.context, "validation")
    device = next(model.parameters()).device
    training = training.to(device)
    generator = torch.Generator().manual_seed(config.seed)
    groups = decay_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, fused=device.type in ("cpu", "cuda")
    )
    history = History()

    def validate(step: int) -> None:
        history.evaluations.append(Evaluation(step, evaluate(model, validation, config)))
        if on_progress is not None:
            on_progress(history)

    model.train()
    try:
        validate(0)
        for step in range(1, config.steps + 1):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            inputs, targets = sample_batch(training, config.batch_size, config.context, generator)
            with _autocast(device, config.precision):
                _, loss = model(inputs, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
            # .item() waits for the device, so that the clock below is honest.
            loss_value, norm_value = loss.item(), norm.item()
            if not math.isfinite(loss_value + norm_value):
                raise FloatingPointError(
                    f"step {step}: loss {loss_value}, gradient norm {norm_value}; the weights are "
                    "those of the step before. Try a lower learning_rate."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            validation_due = step == config.steps or step % config.evaluation_interval == 0
            if validation_due and device.type == "cuda":
                torch.cuda.synchronize(device)  # else the next step's .item() waits for the update
            history.training_seconds += time.perf_counter() - start
            history.training_tokens += inputs.numel()
            rate = config.learning_rate_at(step)
            history.steps.append(Step(step, loss_value, rate, norm_value))
            if on_progress is not None:
                on_progress(history)
            if validation_due:
                validate(step)
    except KeyboardInterrupt:
        history.interrupted = True
        optimizer.zero_grad(set_to_none=True)
    return history


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: torch.Tensor, config: TrainingConfig) -> float:
    """Mean loss in nats per token over the stream's first windows, in eval mode.

    Args:
        tokens: (N,) int64; at most `config.evaluation_tokens` of it are used, at least one window.
    """
    device = next(model.parameters()).device
    count = max(config.evaluation_tokens, config.context)
    was_training = model.training
    model.eval()
    try:
        total, targets_seen = 0.0, 0
        stream = tokens[: count + 1].to(device)
        for inputs, targets in consecutive_batches(stream, config.batch_size, config.context):
            with _autocast(device, config.precision):
                _, loss = model(inputs, targets)
            total += loss.item() * targets.numel()
            targets_seen += targets.numel()
    finally:
        model.train(was_training)
    return total / targets_seen


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
