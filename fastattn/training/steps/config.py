"""How to train: all numbers of the loop in one place, checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastattn.nn.checks import (
    check_bool,
    check_choice,
    check_integer,
    check_number,
    check_seed,
    check_within,
)
from fastattn.training.steps.schedules import SCHEDULES

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch_size: examples a batch; where examples are joined to rows, `context` tokens for each.
        context: tokens of the longest example, or piece of one.
        accumulation: batches a step, one after the other; their targets count alike, so that the
            step is that of one large batch.
        learning_rate: the peak, reached after the warm-up.
        final_learning_rate: where the schedule ends.
        schedule: "cosine", "linear", "constant" (at the peak), or "wsd": at the peak until the
            decay, then linear.
        warmup_steps: steps over which the rate rises linearly from 0.
        decay_share: of "wsd": the share of the steps after the warm-up that the decay takes.
        optimizer: "adamw", or "muon": Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon)
            for the matrices of the blocks and AdamW for the rest. Muon's updates are scaled to the
            size of AdamW's, so that both take the same learning rate.
        betas: AdamW's.
        weight_decay: of matrices and embeddings; biases and norms have none.
        max_gradient_norm: gradients are scaled down to this norm; infinity never scales.
        ema_decay: of a moving average of the weights, which is evaluated and saved in their place;
            0 for none. The first steps weigh more: the decay of step t is at most (1 + t)/(10 + t).
        activation_checkpointing: keep only the input of each block for the backward, and compute
            the block again there: less memory, a third more work, the same results.
        evaluation_interval: steps between two validations.
        evaluation_tokens: how many tokens of the validation data to use at most, from the start, in
            whole batches; 0 for all.
        precision: "bfloat16" and "float16" run under autocast, the latter with a scaled loss;
            "auto" is "bfloat16" on CUDA and "float32" elsewhere.
        seed: of the order of the examples and of dropout.

    Raises:
        TypeError: a value has another type; the message names it.
        ValueError: a value is out of range; the message names it.
    """

    steps: int
    batch_size: int = 8
    context: int = 128
    accumulation: int = 1
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 20
    decay_share: float = 0.1
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.0
    activation_checkpointing: bool = False
    evaluation_interval: int = 50
    evaluation_tokens: int = 0
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "accumulation", "evaluation_interval"):
            check_integer(name, getattr(self, name), at_least=1)
        for name in ("warmup_steps", "evaluation_tokens"):
            check_integer(name, getattr(self, name), at_least=0)
        check_seed("seed", check_integer("seed", self.seed))
        rate, final = self.learning_rate, self.final_learning_rate
        check_within("learning_rate", rate, "(0, inf)", "positive and finite")
        check_within(
            "final_learning_rate", final, f"[0, {rate}]", f"in [0, learning_rate={rate:g}]"
        )
        check_within("decay_share", self.decay_share, "(0, 1]")
        check_within("weight_decay", self.weight_decay, "[0, inf)", "at least 0")
        check_within("max_gradient_norm", self.max_gradient_norm, "(0, inf]", "positive")
        check_within("ema_decay", self.ema_decay, "[0, 1)")
        check_bool("activation_checkpointing", self.activation_checkpointing)
        if not isinstance(self.betas, (tuple, list)):
            raise TypeError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            check_number("each of betas", beta)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision", self.precision, PRECISIONS)

    def extends(self, steps: int, done: int) -> bool:
        """Whether a run of so many `steps`, of which some are `done`, may go on by this config.

        It may if the learning rates so far are the same: "constant", "wsd" before its decay, the
        others in the warm-up. The last of them says so, since schedules only fall.
        """
        former = dataclasses.replace(self, steps=steps)
        same = done == 0 or former.learning_rate_at(done) == self.learning_rate_at(done)
        return same and done <= self.steps

    def learning_rate_at(self, step: int) -> float:
        """The rate of optimiser step `step`, counted from 1 to `steps`."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = SCHEDULES[self.schedule](min(1.0, done), self.decay_share)
        return self.final_learning_rate + left * (self.learning_rate - self.final_learning_rate)
