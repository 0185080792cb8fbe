"""The moving average of the weights: its formula, and that it is evaluated and kept."""

from __future__ import annotations

from pathlib import Path

import torch
from training.small import HELD_OUT, OBJECTIVE, model, same, trained, weights, windows, with_changes

from fastattn.models import GPT
from fastattn.training import Checkpoints, History, evaluate


def test_it_is_the_formula_and_is_what_is_evaluated_saved_and_left(tmp_path: Path) -> None:
    config = with_changes(steps=6, ema_decay=0.4, evaluation_interval=3)
    subject = model()
    expected = {name: value.double() for name, value in weights(subject).items()}
    raw: list[dict[str, torch.Tensor]] = []

    def watch(history: History) -> None:
        step = len(history.steps)
        if step > len(raw):
            raw.append(weights(subject))
            decay = min(0.4, (1 + step) / (10 + step))
            for name, value in expected.items():
                value.mul_(decay).add_(raw[-1][name].double(), alpha=1 - decay)

    checkpoints = Checkpoints(tmp_path)
    history = trained(subject, config, on_progress=watch, checkpoints=checkpoints)
    plain = model()
    without = trained(plain, with_changes(steps=6, evaluation_interval=3))
    assert without.steps == history.steps
    loss = evaluate(plain, OBJECTIVE, windows(HELD_OUT), config)["loss"]
    assert without.evaluations[-1].loss == loss
    assert same(raw[-1], weights(plain))  # the average does not touch the training
    left = weights(subject)
    assert not same(left, raw[-1])
    for name, value in left.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
    loss = evaluate(subject, OBJECTIVE, windows(HELD_OUT), config)["loss"]
    assert history.evaluations[-1].loss == loss
    assert checkpoints.last == checkpoints.path(6)
    assert same(weights(GPT.from_pretrained(checkpoints.path(6) / "model")), left)


def test_weights_in_half_precision_are_averaged_in_float32() -> None:
    subject = model().bfloat16()
    config = with_changes(steps=30, ema_decay=0.999, warmup_steps=0, learning_rate=1e-2)
    before = weights(subject)
    trained(subject, config, validation=None)
    assert {value.dtype for value in subject.state_dict().values()} == {torch.bfloat16}
    moved = [not torch.equal(value, before[name]) for name, value in weights(subject).items()]
    assert all(moved)
