"""The training loop: it learns, repeats itself with a seed, and stops cleanly."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy
import pytest
import torch
from training.small import (
    CONFIG,
    HELD_OUT,
    OBJECTIVE,
    STREAM,
    VOCABULARY,
    model,
    same,
    stopping,
    trained,
    weights,
    windows,
    with_changes,
)

from fastattn.training import (
    Causal,
    Checkpoints,
    History,
    evaluate,
    train,
)
from fastattn.training.contract import Batch
from fastattn.training.fingerprints import batches_digest
from fastattn.training.steps.optimizers import muon_is_fast


def test_it_learns_and_records() -> None:
    seen: list[tuple[int, int]] = []
    subject = model()
    subject.eval()
    history = trained(
        subject, on_progress=lambda h: seen.append((len(h.steps), len(h.evaluations)))
    )
    assert history.evaluations[0].loss == pytest.approx(math.log(VOCABULARY), rel=0.1)
    assert history.evaluations[-1].loss < 0.2
    assert history.steps[-1].loss < 0.2 < history.steps[0].loss
    assert [evaluation.step for evaluation in history.evaluations] == [0, 25, 50, 60]
    assert [step.step for step in history.steps] == list(range(1, 61))
    assert [step.learning_rate for step in history.steps] == [
        CONFIG.learning_rate_at(step) for step in range(1, 61)
    ]
    assert {step.tokens for step in history.steps} == {4 * 16}
    assert history.training_tokens == 60 * 4 * 16
    assert history.tokens_per_second == history.training_tokens / history.training_seconds > 0
    assert seen[:2] == [(0, 1), (1, 1)] and seen[-1] == (60, 4)
    assert not subject.training and not history.interrupted
    assert all(parameter.grad is None for parameter in subject.parameters())


def test_a_seed_gives_the_same_bits() -> None:
    """Whatever the global generators are at; and they are afterwards as they were."""

    def run(seed: int, outside: int) -> tuple[History, dict[str, torch.Tensor]]:
        subject = model(dropout=0.1)
        torch.manual_seed(outside)
        random.seed(outside)
        numpy.random.seed(outside)
        history = trained(subject, with_changes(steps=8, seed=seed))
        drawn = torch.rand(()).item(), random.random(), numpy.random.random()
        torch.manual_seed(outside)
        random.seed(outside)
        numpy.random.seed(outside)
        assert drawn == (torch.rand(()).item(), random.random(), numpy.random.random())
        return history, weights(subject)

    first, expected = run(0, outside=1)
    again, got = run(0, outside=2)
    other, _ = run(1, outside=1)
    assert first == again and same(expected, got)
    assert first.steps != other.steps


def test_an_evaluation_or_a_callback_in_between_changes_nothing() -> None:
    def draw(_: History) -> None:
        torch.rand(7)

    subjects = model(dropout=0.1), model(dropout=0.1)
    first = trained(subjects[0], with_changes(steps=6))
    again = trained(subjects[1], with_changes(steps=6, evaluation_interval=2), on_progress=draw)
    assert first.steps == again.steps and same(weights(subjects[0]), weights(subjects[1]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=str)
def test_it_trains_where_gradients_are_off(context: Any) -> None:
    subjects = model(), model()
    trained(subjects[0], with_changes(steps=3))
    with context():
        trained(subjects[1], with_changes(steps=3))
    assert same(weights(subjects[0]), weights(subjects[1]))


def test_muon_learns_and_changes_every_parameter() -> None:
    if not muon_is_fast(torch.device("cpu")):
        pytest.skip("Muon takes minutes on a CPU without AVX-512")
    subject = model()
    before = weights(subject)
    history = trained(subject, with_changes(optimizer="muon"))
    assert history.evaluations[-1].loss < 0.2
    assert not any(torch.equal(value, before[name]) for name, value in subject.state_dict().items())


class Ragged:
    """Batches with 1, 2, 3, ... of `rows` in turn: their targets count by their number."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def batch(self, index: int) -> Batch:
        start = index * (index + 1) // 2
        rows = self.rows[start : start + index + 1]
        targets = rows[:, 1:].clone()
        targets[0, index:] = -100
        return Batch(
            {"input_ids": rows[:, :-1], "targets": targets},
            int((targets >= 0).sum()), rows[:, 1:].numel(),
        )  # fmt: skip


def test_accumulated_batches_count_as_one_large_one() -> None:
    """The mean over all targets of the step, not of the batches' means: to rounding in float64."""
    rows = torch.randint(VOCABULARY, (6, 13))
    small = Ragged(rows)
    parts = [small.batch(i) for i in range(3)]
    arguments = {
        name: torch.cat([part.arguments[name] for part in parts]) for name in parts[0].arguments
    }
    whole = Batch(arguments, sum(p.counted for p in parts), sum(p.tokens for p in parts))
    assert len({p.counted for p in parts}) == 3

    class One:
        def batch(self, index: int) -> Batch:
            return whole

    subjects = [model().double() for _ in range(2)]
    one, many = (
        train(subject, OBJECTIVE, data, with_changes(steps=1, warmup_steps=0, accumulation=a))
        for subject, data, a in ((subjects[0], One(), 1), (subjects[1], small, 3))
    )
    assert many.steps[0].loss == pytest.approx(one.steps[0].loss, rel=1e-6)  # a float32 loss
    assert many.steps[0].gradient_norm == pytest.approx(one.steps[0].gradient_norm, rel=1e-6)
    assert many.steps[0].tokens == one.steps[0].tokens == whole.tokens
    for x, y in zip(*(subject.parameters() for subject in subjects)):
        # AdamW's first step is the sign of the gradient, where that is not about its epsilon.
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_batches_without_a_target_are_left_out_and_a_step_of_them_is_refused() -> None:
    class Masked:
        def __init__(self, *counts: bool) -> None:
            self.counts = counts

        def batch(self, index: int) -> Batch:
            batch = windows().batch(0)
            if self.counts[index]:
                return batch
            targets = torch.full_like(batch.arguments["targets"], -100)
            return Batch({**batch.arguments, "targets": targets}, 0, batch.tokens)

    config = with_changes(steps=1, accumulation=2)
    subjects = model(), model()
    half = train(subjects[0], OBJECTIVE, Masked(True, False), config)
    full = train(subjects[1], OBJECTIVE, windows(), with_changes(steps=1))
    assert half.steps[0].loss == full.steps[0].loss and math.isfinite(half.steps[0].gradient_norm)
    assert same(weights(subjects[0]), weights(subjects[1]))
    with pytest.raises(ValueError, match="step 1: none of its targets counts in the loss"):
        train(model(), OBJECTIVE, Masked(False, False), config)


def test_gradients_are_clipped() -> None:
    """With a tiny bound on the norm the recorded norm is that before, and SGD-like steps shrink."""
    subject, norms = model(), []
    for parameter in subject.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    captured: list[torch.Tensor] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any) -> Any:
        captured.extend(p.grad.norm() for g in self.param_groups for p in g["params"])
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        history = trained(subject, with_changes(steps=1, warmup_steps=0, max_gradient_norm=1e-3))
    assert history.steps[0].gradient_norm == pytest.approx(torch.stack(norms).norm().item())
    assert torch.stack(captured).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_is_the_mean_over_the_windows_in_eval_mode() -> None:
    subject = model(dropout=0.5)
    subject.train()
    # Five windows of 16 in batches of 4: the limit holds at the end of a batch.
    for limit, count in ((0, 5), (65, 5), (64, 4), (1, 4)):
        measures = evaluate(
            subject, OBJECTIVE, windows(STREAM[:81]), with_changes(evaluation_tokens=limit)
        )
        assert subject.training
        subject.eval()
        inputs, targets = STREAM[: 16 * count].view(-1, 16), STREAM[1 : 16 * count + 1].view(-1, 16)
        with torch.no_grad():
            logits = subject(inputs)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert measures["loss"] == pytest.approx(expected.item(), rel=1e-5)
        subject.train()


def _modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("whole", [True, False])
def test_each_module_gets_its_own_mode_back(whole: bool) -> None:
    subject = model(dropout=0.5)
    subject.train(whole)
    subject.blocks[0].train(not whole)
    subject.wte.train(not whole)
    before, seen = _modes(subject), []
    subject.register_forward_pre_hook(lambda *_: seen.append(_modes(subject)))
    evaluate(subject, OBJECTIVE, windows(HELD_OUT), CONFIG)
    assert _modes(subject) == before and not any(map(any, seen))
    trained(subject, with_changes(steps=1))
    assert _modes(subject) == before
    # The training step: modules that a model in train mode has in eval mode stay so.
    assert (before if whole else [True] * len(before)) in seen


def test_modes_come_back_after_an_error() -> None:
    subject = model().eval()
    subject.blocks[0].train()
    before = _modes(subject)
    subject.norm_f.register_forward_pre_hook(lambda *_: 1 / 0)
    for call in (lambda: evaluate(subject, OBJECTIVE, windows(), CONFIG),
                 lambda: trained(subject)):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            call()
        assert _modes(subject) == before


def test_ctrl_c_keeps_the_record_and_the_model() -> None:
    subject = model()
    history = trained(subject, on_progress=stopping(5))
    assert history.interrupted and len(history.steps) == 5
    assert all(parameter.isfinite().all() for parameter in subject.parameters())
    assert all(parameter.grad is None for parameter in subject.parameters())


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_a_step_that_is_not_finite_names_its_batches_and_the_last_checkpoint(
    of: str, tmp_path: Any
) -> None:
    """In the second of two batches of step 3; the weights are those after step 2."""

    class Broken(Causal):
        calls = 0

        def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            self.calls += 1
            loss = super().loss(model, batch)
            if self.calls < 6:
                return loss
            return loss * math.inf if of == "loss" else loss + (0 * loss).sqrt() - (0 * loss)

    config = with_changes(steps=9, accumulation=2)
    subject, other = model(), model()
    train(other, OBJECTIVE, windows(), config, on_progress=stopping(2))
    digest = batches_digest([windows().batch(4), windows().batch(5)])
    checkpoints = Checkpoints(tmp_path, every_steps=2)
    with pytest.raises(FloatingPointError) as caught:
        train(subject, Broken(OBJECTIVE.tokenizer), windows(), config, checkpoints=checkpoints)
    message = str(caught.value)
    assert message.startswith("step 3: loss ") and f"in the batch {digest};" in message
    assert "the weights are those of the step before" in message and "lower learning" in message
    assert f"the last good checkpoint is {tmp_path / 'step-000002'}" in message
    assert same(weights(subject), weights(other))


def test_nothing_to_train_is_refused() -> None:
    frozen = model().requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no parameter of model requires .*requires_grad_\(True\)"
    ):
        trained(frozen)
    evaluate(frozen, OBJECTIVE, windows(), CONFIG)
    with pytest.raises(ValueError, match="model has no parameters"):
        trained(torch.nn.Identity())
    with pytest.raises(ValueError, match="model has no parameters"):
        evaluate(torch.nn.Identity(), OBJECTIVE, windows(), CONFIG)
    frozen.norm_f.bias.requires_grad_(True)
    before = weights(frozen)
    assert trained(frozen, with_changes(steps=2)).steps
    changed = {name for name, value in frozen.state_dict().items()
               if not torch.equal(value, before[name])}  # fmt: skip
    assert changed == {"norm_f.bias"}


def test_a_model_of_another_kind_is_refused() -> None:
    class LossAlone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = model()

        def forward(self, **arguments: torch.Tensor) -> torch.Tensor:
            return self.gpt(**arguments)[1]

    with pytest.raises(TypeError, match=r"the pair \(logits, loss\), got Tensor"):
        trained(LossAlone())
