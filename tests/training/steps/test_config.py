"""The settings of a run, and the learning rates that follow from them."""

from __future__ import annotations

import itertools

import pytest

from fastattn.training import TrainingConfig


def test_the_rate_rises_then_falls_as_a_cosine() -> None:
    rates = _rates("cosine")
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[59] == pytest.approx(1.25)  # half way down
    assert rates[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    short = TrainingConfig(steps=2, warmup_steps=2)
    assert short.learning_rate_at(2) == short.learning_rate


def _rates(schedule: str, **changes: float) -> list[float]:
    config = TrainingConfig(
        steps=110, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.5, schedule=schedule,
        **changes,
    )  # fmt: skip
    return [config.learning_rate_at(step) for step in range(1, 111)]


def test_the_other_schedules_are_their_formulas() -> None:
    warmup = [0.2 * i for i in range(1, 11)]
    assert _rates("constant") == pytest.approx([*warmup, *[2.0] * 100])
    assert _rates("linear") == pytest.approx([*warmup, *[2 - 0.015 * i for i in range(1, 101)]])
    falling = [2 - 1.5 * i / 25 for i in range(1, 26)]
    assert _rates("wsd", decay_share=0.25) == pytest.approx([*warmup, *[2.0] * 75, *falling])
    assert _rates("wsd", decay_share=1.0) == pytest.approx(_rates("linear"))


@pytest.mark.parametrize(
    ("schedule", "steps", "done", "may"),
    [
        ("constant", 60, 60, True), ("constant", 200, 110, True), ("constant", 200, 111, False),
        ("cosine", 60, 10, True), ("cosine", 60, 11, False), ("cosine", 200, 60, False),
        ("cosine", 60, 0, True), ("cosine", 110, 110, True), ("linear", 60, 20, False),
        ("wsd", 60, 50, True), ("wsd", 60, 56, False), ("wsd", 200, 99, True),
        ("wsd", 200, 101, False), ("wsd", 60, 60, False),
    ],
)  # fmt: skip
def test_more_steps_where_the_rates_so_far_are_the_same(
    schedule: str, steps: int, done: int, may: bool
) -> None:
    """Of 110 steps, 10 of them warm-up; "wsd" falls in a tenth of the rest."""
    config, former = (
        TrainingConfig(steps=count, warmup_steps=10, schedule=schedule) for count in (110, steps)
    )
    assert config.extends(steps, done) is may
    so_far = [
        former.learning_rate_at(step) == config.learning_rate_at(step)
        for step in range(1, done + 1)
    ]
    assert may == (all(so_far) and done <= 110)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("steps", 0, ValueError, "steps must be at least 1, got 0"),
        ("batch_size", 0, ValueError, "batch_size must be at least 1"),
        ("context", -1, ValueError, "context must be at least 1"),
        ("evaluation_interval", 0, ValueError, "evaluation_interval must be at least 1"),
        ("evaluation_tokens", -1, ValueError, "evaluation_tokens must be at least 0"),
        ("accumulation", 0, ValueError, "accumulation must be at least 1"),
        ("warmup_steps", -1, ValueError, "warmup_steps must be at least 0"),
        ("learning_rate", 0.0, ValueError, "learning_rate must be positive and finite"),
        ("learning_rate", float("nan"), ValueError, "learning_rate must be positive"),
        ("final_learning_rate", 1.0, ValueError, r"final_learning_rate must be in \[0, learning_rate=0.001\]"),
        ("weight_decay", -0.1, ValueError, "weight_decay must be at least 0"),
        ("decay_share", 0.0, ValueError, r"decay_share must be in \(0, 1\]"),
        ("ema_decay", 1.0, ValueError, r"ema_decay must be in \[0, 1\)"),
        ("schedule", "step", ValueError, "schedule must be one of 'cosine', 'linear', .*got 'step'"),
        ("optimizer", "sgd", ValueError, "optimizer must be one of .*got 'sgd'"),
        ("betas", (0.9, 1.0), ValueError, r"betas must be two numbers in \[0, 1\)"),
        ("betas", (0.9,), ValueError, "betas must be two numbers"),
        ("max_gradient_norm", 0.0, ValueError, "max_gradient_norm must be positive"),
        ("precision", "fp8", ValueError, "precision must be one of .*got 'fp8'"),
        ("steps", "10", TypeError, "steps must be an integer, got '10'"),
        ("steps", True, TypeError, "steps must be an integer, got True"),
        ("batch_size", 2.0, TypeError, "batch_size must be an integer, got 2.0"),
        ("learning_rate", "1e-3", TypeError, "learning_rate must be a number, got '1e-3'"),
        ("weight_decay", None, TypeError, "weight_decay must be a number, got None"),
        ("betas", 0.9, TypeError, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ("betas", ("a", 0.9), TypeError, "each of betas must be a number, got 'a'"),
        ("activation_checkpointing", 1, TypeError, "activation_checkpointing must be True or False, got 1"),
        ("ema_decay", None, TypeError, "ema_decay must be a number"),
        ("seed", 1.5, TypeError, "seed must be an integer, got 1.5"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(
    name: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainingConfig(**{"steps": 10, name: value})


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_beyond_64_bits_are_refused(seed: int) -> None:
    with pytest.raises(
        ValueError, match=r"seed must be from -2\*\*63 to 2\*\*64 - 1, got .*modulo"
    ):
        TrainingConfig(steps=1, seed=seed)
    TrainingConfig(steps=1, seed=min(max(seed, -(2**63)), 2**64 - 1))
