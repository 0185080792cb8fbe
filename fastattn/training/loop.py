"""The training loop: AdamW, warm-up and cosine, clipped gradients, validation, measured speed.

    history = train(model, split.training, split.validation, TrainingConfig(steps=300))

A model is anything that is called as `model(inputs, targets) -> (logits, loss)`; the data are token
streams. The loop knows nothing of files, progress bars or folders.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.nn.checks import check_integer, check_number, check_seed
from fastattn.nn.mode import in_mode
from fastattn.training.data.streams import check_stream, consecutive_batches, sample_batch
from fastattn.training.history import Evaluation, History, Step

PRECISIONS = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")


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
        optimizer: "adamw", or "muon": Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon)
            for the matrices of the blocks and AdamW for the rest. Muon's updates are scaled to the
            size of AdamW's, so that both take the same learning rate.
        betas: AdamW's.
        max_gradient_norm: gradients are scaled down to this norm; infinity never scales.
        evaluation_interval: steps between two validations.
        evaluation_tokens: how many tokens of the validation stream to use at most, from its start.
        precision: "bfloat16" runs under autocast; "auto" is that on CUDA and "float32" elsewhere.
        seed: of the order of the batches.

    Raises:
        TypeError: a value has another type; the message names it.
        ValueError: a value is out of range; the message names it.
    """

    steps: int
    batch_size: int = 8
    context: int = 128
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 20
    weight_decay: float = 0.1
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    evaluation_interval: int = 50
    evaluation_tokens: int = 16384
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "evaluation_interval", "evaluation_tokens"):
            count = check_integer(name, getattr(self, name))
            _check(name, count, count >= 1, "at least 1")
        warmup = check_integer("warmup_steps", self.warmup_steps)
        _check("warmup_steps", warmup, warmup >= 0, "at least 0")
        check_seed("seed", check_integer("seed", self.seed))
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "max_gradient_norm"):
            check_number(name, getattr(self, name))
        rate, final = self.learning_rate, self.final_learning_rate
        _check("learning_rate", rate, 0 < rate < math.inf, "positive and finite")
        _check("final_learning_rate", final, 0 <= final <= rate, f"in [0, learning_rate={rate:g}]")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        _check("max_gradient_norm", self.max_gradient_norm, self.max_gradient_norm > 0, "positive")
        if not isinstance(self.betas, (tuple, list)):
            raise TypeError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            check_number("each of betas", beta)
        _check("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}")
        valid = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check("betas", self.betas, valid, "two numbers in [0, 1)")
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


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: what has two dimensions or more decays, vectors do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def block_matrices(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The trained matrices inside the `torch.nn.ModuleList`s of `model`, without embeddings."""
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return {
        parameter
        for block in blocks
        for module in block.modules()
        if not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2 and parameter.requires_grad
    }


def muon_is_fast(device: torch.device) -> bool:
    """Whether `device` has fast bfloat16 products: an update of `torch.optim.Muon` is made of them.

    On a CPU without AVX-512 they take 80 times as long as products in float32 (torch 2.13).
    """
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32: a GPU, a CPU with AVX-512 BF16."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def _optimizers(model: torch.nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    groups = decay_groups(model, config.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        on_muon = block_matrices(model)
        matrices = [parameter for parameter in groups[0]["params"] if parameter in on_muon]
        groups[0]["params"] = [p for p in groups[0]["params"] if p not in on_muon]
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    matrices,
                    config.learning_rate,
                    config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizers.append(
        torch.optim.AdamW(groups, config.learning_rate, betas=config.betas, fused=fused)
    )
    return optimizers


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

    Meanwhile the model is in train mode; of a model that is in it already, the modules that are in
    eval mode stay so. Afterwards each module has its own mode again.

    The same model, data, config and number of threads give the same bits on a CPU. Dropout draws
    from torch's global generator. Ctrl-C ends the run: the model stays usable, with the steps made
    so far, and the record says `interrupted`.

    Args:
        model: called as `model(inputs (B, T), targets (B, T)) -> (logits, loss)`.
        training, validation: token streams, (N,) int64.
        config: how.
        on_progress: called after each step and each validation with the record so far.

    Raises:
        ValueError: a stream is shorter than context + 1 tokens, or nothing is there to train.
        FloatingPointError: the loss is no longer finite; the message says at which step.
    """
    check_stream(training, config.context, "training")
    check_stream(validation, config.context, "validation")
    device = _device(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of model requires a gradient, so that nothing would be trained: unfreeze "
            "some of them with requires_grad_(True)"
        )
    training = training.to(device)
    generator = torch.Generator().manual_seed(config.seed)
    optimizers = _optimizers(model, config)
    history = History()

    def validate(step: int) -> None:
        history.evaluations.append(Evaluation(step, evaluate(model, validation, config)))
        if on_progress is not None:
            on_progress(history)

    mode = contextlib.ExitStack()
    if not model.training:
        mode.enter_context(in_mode(model, training=True))
    try:
        validate(0)
        for step in range(1, config.steps + 1):
            start = time.perf_counter()
            rate = config.learning_rate_at(step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            inputs, targets = sample_batch(training, config.batch_size, config.context, generator)
            with _autocast(device, config.precision):
                loss = _loss(model, inputs, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
            # .item() waits for the device, so that the clock below is honest.
            loss_value, norm_value = loss.item(), norm.item()
            if not math.isfinite(loss_value + norm_value):
                raise FloatingPointError(
                    f"step {step}: loss {loss_value}, gradient norm {norm_value}; the weights are "
                    "those of the step before. Try a lower learning_rate."
                )
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            validation_due = step == config.steps or step % config.evaluation_interval == 0
            if validation_due and device.type == "cuda":
                torch.cuda.synchronize(device)  # else the next step's .item() waits for the update
            history.training_seconds += time.perf_counter() - start
            history.training_tokens += inputs.numel()
            history.steps.append(Step(step, loss_value, rate, norm_value))
            if on_progress is not None:
                on_progress(history)
            if validation_due:
                validate(step)
    except KeyboardInterrupt:
        history.interrupted = True
        model.zero_grad(set_to_none=True)
    finally:
        mode.close()
    return history


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: torch.Tensor, config: TrainingConfig) -> float:
    """Mean loss in nats per token over the stream's first windows, in eval mode.

    Afterwards each module of the model has its own mode again.

    Args:
        tokens: (N,) int64; at most `config.evaluation_tokens` of it are used, at least one window.
    """
    device = _device(model)
    count = max(config.evaluation_tokens, config.context)
    total, targets_seen = 0.0, 0
    stream = tokens[: count + 1].to(device)
    with in_mode(model, training=False):
        for inputs, targets in consecutive_batches(stream, config.batch_size, config.context):
            with _autocast(device, config.precision):
                loss = _loss(model, inputs, targets)
            total += loss.item() * targets.numel()
            targets_seen += targets.numel()
    return total / targets_seen


def _device(model: torch.nn.Module) -> torch.device:
    for parameter in model.parameters():
        return parameter.device
    raise ValueError("model has no parameters: there is nothing to train or to evaluate")


def _loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    result = model(inputs, targets)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(
            "model(inputs, targets) must return the pair (logits, loss), got "
            f"{type(result).__name__}: wrap it in a module that does"
        )
    loss: torch.Tensor = result[1]
    return loss


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
