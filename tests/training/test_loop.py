"""The training loop: it learns, repeats itself with a seed, and stops cleanly."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.training import (
    History,
    TrainingConfig,
    evaluate,
    train,
)
from fastattn.training.loop import block_matrices, decay_groups, muon_is_fast

VOCABULARY = 17
# A cycle that the next token follows from the last one: the loss can go to zero.
STREAM = torch.arange(2000) * 5 % VOCABULARY
CONFIG = TrainingConfig(
    steps=60, batch_size=4, context=16, learning_rate=1e-2, final_learning_rate=1e-3,
    warmup_steps=5, evaluation_interval=25, evaluation_tokens=256,
)  # fmt: skip


def model(seed: int = 0, dropout: float = 0.0) -> fastattn.GPT:
    torch.manual_seed(seed)
    config = fastattn.GPTConfig(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2,
        embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return fastattn.GPT(config)


def test_it_learns_and_records() -> None:
    seen: list[tuple[int, int]] = []
    subject = model()
    subject.eval()
    history = train(
        subject, STREAM, STREAM[:300], CONFIG,
        lambda h: seen.append((len(h.steps), len(h.evaluations))),
    )  # fmt: skip
    assert history.evaluations[0].loss == pytest.approx(math.log(VOCABULARY), rel=0.1)
    assert history.evaluations[-1].loss < 0.2
    assert history.steps[-1].loss < 0.2 < history.steps[0].loss
    assert [evaluation.step for evaluation in history.evaluations] == [0, 25, 50, 60]
    assert [step.step for step in history.steps] == list(range(1, 61))
    assert history.training_tokens == 60 * 4 * 16
    assert history.tokens_per_second == history.training_tokens / history.training_seconds > 0
    assert seen[:2] == [(0, 1), (1, 1)] and seen[-1] == (60, 4)
    assert not subject.training and not history.interrupted
    assert all(parameter.grad is None for parameter in subject.parameters())


def test_a_seed_gives_the_same_bits() -> None:
    def run(seed: int) -> tuple[History, dict[str, torch.Tensor]]:
        subject = model(dropout=0.1)
        torch.manual_seed(7)
        config = dataclasses.replace(CONFIG, steps=8, seed=seed)
        return train(subject, STREAM, STREAM[:300], config), subject.state_dict()

    first, weights = run(0)
    again, same = run(0)
    other, _ = run(1)
    assert first.steps == again.steps and first.evaluations == again.evaluations
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first.steps != other.steps


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=str)
def test_it_trains_where_gradients_are_off(context: Any) -> None:
    subjects = model(), model()
    train(subjects[0], STREAM, STREAM[:300], dataclasses.replace(CONFIG, steps=3))
    with context():
        train(subjects[1], STREAM, STREAM[:300], dataclasses.replace(CONFIG, steps=3))
    for x, y in zip(*(subject.parameters() for subject in subjects)):
        assert torch.equal(x, y)


def test_the_rate_rises_then_falls_as_a_cosine() -> None:
    config = TrainingConfig(steps=110, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.5)
    rates = [config.learning_rate_at(step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[59] == pytest.approx(1.25)  # half way down
    assert rates[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    short = TrainingConfig(steps=2, warmup_steps=2)
    assert short.learning_rate_at(2) == short.learning_rate


def test_matrices_decay_and_vectors_do_not() -> None:
    subject = model()
    decayed, plain = decay_groups(subject, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    groups: Any = (decayed["params"], plain["params"])
    assert all(parameter.dim() >= 2 for parameter in groups[0])
    assert all(parameter.dim() == 1 for parameter in groups[1])
    # Every parameter once, the tied embedding included.
    assert len(groups[0]) + len(groups[1]) == len(list(subject.parameters()))
    subject.requires_grad_(False)
    assert [group["params"] for group in decay_groups(subject, 0.3)] == [[], []]


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    subject = model()
    names = {id(parameter): name for name, parameter in subject.named_parameters()}
    found = {names[id(parameter)] for parameter in block_matrices(subject)}
    for block in ("blocks.0", "blocks.1"):
        attention = {f"{block}.attention.in_proj.weight", f"{block}.attention.out_proj.weight"}
        ffn = {f"{block}.feed_forward.linear1.weight", f"{block}.feed_forward.linear2.weight"}
        assert attention | ffn <= found
    assert len(found) == 8
    subject.blocks[0].requires_grad_(False)
    assert len(block_matrices(subject)) == 4
    inside = torch.nn.ModuleList([torch.nn.Embedding(3, 4), torch.nn.Linear(4, 4)])
    assert block_matrices(inside) == {inside[1].weight}


def test_muon_learns_and_changes_every_parameter() -> None:
    if not muon_is_fast(torch.device("cpu")):
        pytest.skip("Muon takes minutes on a CPU without AVX-512")
    subject = model()
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    config = dataclasses.replace(CONFIG, optimizer="muon")
    history = train(subject, STREAM, STREAM[:300], config)
    assert history.evaluations[-1].loss < 0.2
    assert not any(torch.equal(value, before[name]) for name, value in subject.state_dict().items())


def test_gradients_are_clipped() -> None:
    """With a tiny bound on the norm the recorded norm is that before, and SGD-like steps shrink."""
    config = dataclasses.replace(CONFIG, steps=1, warmup_steps=0, max_gradient_norm=1e-3)
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
        history = train(subject, STREAM, STREAM, config)
    assert history.steps[0].gradient_norm == pytest.approx(torch.stack(norms).norm().item())
    assert torch.stack(captured).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_is_the_mean_over_the_windows_in_eval_mode() -> None:
    subject = model(dropout=0.5)
    subject.train()
    config = dataclasses.replace(CONFIG, evaluation_tokens=80)  # five windows of 16
    loss = evaluate(subject, STREAM, config)
    assert subject.training
    subject.eval()
    inputs, targets = STREAM[:80].view(5, 16), STREAM[1:81].view(5, 16)
    with torch.no_grad():
        logits = subject(inputs)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)


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
    config = dataclasses.replace(CONFIG, steps=1)
    evaluate(subject, STREAM, config)
    assert _modes(subject) == before and not any(map(any, seen))
    train(subject, STREAM, STREAM, config)
    assert _modes(subject) == before
    # The training step: modules that a model in train mode has in eval mode stay so.
    assert (before if whole else [True] * len(before)) in seen


def test_modes_come_back_after_an_error() -> None:
    subject = model().eval()
    subject.blocks[0].train()
    before = _modes(subject)
    subject.norm_f.register_forward_pre_hook(lambda *_: 1 / 0)
    for call in (lambda: evaluate(subject, STREAM, CONFIG),
                 lambda: train(subject, STREAM, STREAM, CONFIG)):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            call()
        assert _modes(subject) == before


def test_bfloat16_runs_under_autocast() -> None:
    config = dataclasses.replace(CONFIG, precision="bfloat16")
    subject = model()
    seen = []
    subject.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    history = train(subject, STREAM, STREAM[:300], config)
    assert all(seen)
    assert history.evaluations[-1].loss < 0.3
    assert {parameter.dtype for parameter in subject.parameters()} == {torch.float32}


def test_ctrl_c_keeps_the_record_and_the_model() -> None:
    def interrupt(history: History) -> None:
        if len(history.steps) == 5:
            raise KeyboardInterrupt

    subject = model()
    history = train(subject, STREAM, STREAM, CONFIG, interrupt)
    assert history.interrupted and len(history.steps) == 5
    assert all(parameter.isfinite().all() for parameter in subject.parameters())
    assert all(parameter.grad is None for parameter in subject.parameters())


def test_a_loss_that_is_not_finite_stops_with_the_weights_of_before() -> None:
    subject = model()
    with torch.no_grad():
        next(subject.parameters()).fill_(1e30)
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"step 1: loss .* Try a lower learning_rate"):
        train(subject, STREAM, STREAM, CONFIG)
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1; got 0"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("context", -1, "context must be at least 1"),
        ("evaluation_interval", 0, "evaluation_interval must be at least 1"),
        ("evaluation_tokens", 0, "evaluation_tokens must be at least 1"),
        ("warmup_steps", -1, "warmup_steps must be at least 0"),
        ("learning_rate", 0.0, "learning_rate must be positive and finite"),
        ("learning_rate", float("nan"), "learning_rate must be positive"),
        ("final_learning_rate", 1.0, r"final_learning_rate must be in \[0, learning_rate=0.001\]"),
        ("weight_decay", -0.1, "weight_decay must be at least 0"),
        ("optimizer", "sgd", "optimizer must be one of .*got 'sgd'"),
        ("betas", (0.9, 1.0), r"betas must be two numbers in \[0, 1\)"),
        ("betas", (0.9,), "betas must be two numbers"),
        ("max_gradient_norm", 0.0, "max_gradient_norm must be positive"),
        ("precision", "fp8", "precision must be one of .*got 'fp8'"),
    ],
)
def test_bad_settings_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"steps": 10, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "10", "steps must be an integer, got '10'"),
        ("steps", True, "steps must be an integer, got True"),
        ("batch_size", 2.0, "batch_size must be an integer, got 2.0"),
        ("learning_rate", "1e-3", "learning_rate must be a number, got '1e-3'"),
        ("weight_decay", None, "weight_decay must be a number, got None"),
        ("betas", 0.9, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ("betas", ("a", 0.9), "each of betas must be a number, got 'a'"),
        ("seed", 1.5, "seed must be an integer, got 1.5"),
    ],
)
def test_settings_of_another_type_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TrainingConfig(**{"steps": 10, name: value})


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_beyond_64_bits_are_refused(seed: int) -> None:
    with pytest.raises(
        ValueError, match=r"seed must be from -2\*\*63 to 2\*\*64 - 1, got .*modulo"
    ):
        TrainingConfig(steps=1, seed=seed)
    TrainingConfig(steps=1, seed=min(max(seed, -(2**63)), 2**64 - 1))


def test_nothing_to_train_is_refused() -> None:
    frozen = model().requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no parameter of model requires .*requires_grad_\(True\)"
    ):
        train(frozen, STREAM, STREAM, CONFIG)
    evaluate(frozen, STREAM, CONFIG)
    with pytest.raises(ValueError, match="model has no parameters"):
        train(torch.nn.Identity(), STREAM, STREAM, CONFIG)
    with pytest.raises(ValueError, match="model has no parameters"):
        evaluate(torch.nn.Identity(), STREAM, CONFIG)
    frozen.norm_f.bias.requires_grad_(True)
    assert train(frozen, STREAM, STREAM, dataclasses.replace(CONFIG, steps=2)).steps


def test_a_model_of_another_kind_is_refused() -> None:
    class LossAlone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = model()

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.gpt(inputs, targets)[1]

    with pytest.raises(TypeError, match=r"must return the pair \(logits, loss\), got Tensor"):
        train(LossAlone(), STREAM, STREAM, CONFIG)


def test_streams_shorter_than_the_context_are_refused() -> None:
    short = STREAM[:16]
    with pytest.raises(ValueError, match="training has 16 tokens; a context of 16 needs"):
        train(model(), short, STREAM, CONFIG)
    with pytest.raises(ValueError, match="validation has 16 tokens"):
        train(model(), STREAM, short, CONFIG)


def test_history_survives_json_and_is_drawn(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=3)
    history = train(model(), STREAM, STREAM, config)
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    history.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    History().plot(tmp_path / "empty.png")  # interrupted before the first step
    assert len(list(tmp_path.iterdir())) == 3


def test_history_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    History().save("~/history.json")
    assert History.load("~/history.json") == History()
    History().plot("~/loss.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "loss.png"]
    with pytest.raises(ValueError, match="path is an empty path"):
        History.load("")
