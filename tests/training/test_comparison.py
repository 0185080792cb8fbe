"""The comparison of an accelerated model with its original: the rule, and the clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fastattn.training.comparison import LEAST_ROUNDS, compare, difference, time_by_turns

EXACT = {"a": torch.linspace(-1, 1, 64).double(), "b": 1e-3 * torch.linspace(1, 2, 64).double()}
SIGN = torch.tensor([1.0, -1.0]).repeat(32).double()


def _off(by: float) -> dict[str, torch.Tensor]:
    """Both tensors off by `by` of their own scale."""
    return {name: t + by * t.abs().max() * SIGN for name, t in EXACT.items()}


@pytest.mark.parametrize(
    ("ours", "original", "holds"),
    [(1e-3, 1e-3, True), (1.4e-3, 1e-3, True), (1.6e-3, 1e-3, False), (0.0, 1e-3, True)],
)
def test_the_rule_compares_errors_against_float64(
    ours: float, original: float, holds: bool
) -> None:
    found = difference("gradients", _off(ours), _off(original), EXACT, ["a", "b"])
    assert found.holds is holds
    assert found.error == pytest.approx(ours) and found.original_error == pytest.approx(original)
    assert found.absolute == pytest.approx(abs(ours - original))


def test_a_small_tensor_counts_as_much_as_a_large_one() -> None:
    wrong = {"a": EXACT["a"], "b": torch.zeros(64).double()}
    found = difference("gradients", wrong, _off(1e-4), EXACT, ["a", "b"])
    assert not found.holds and found.error == pytest.approx(1.0)
    assert difference("logits", wrong, _off(1e-4), EXACT, ["a"]).holds


def test_a_few_units_in_the_last_place_are_allowed_and_nan_is_not() -> None:
    exact = {name: t.float().double() for name, t in EXACT.items()}
    original = {name: t.float() for name, t in exact.items()}
    last_place = {name: t + t.abs().max() * 2e-7 * SIGN.float() for name, t in original.items()}
    assert difference("logits", last_place, original, exact, ["a", "b"]).holds
    broken = {**original, "b": torch.full((64,), float("nan"))}
    assert not difference("logits", broken, original, exact, ["a", "b"]).holds


def test_work_is_timed_by_turns() -> None:
    calls: list[str] = []

    def quick() -> None:
        calls.append("quick")

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.002)

    times = time_by_turns({"quick": quick, "slow": slow}, torch.device("cpu"), 0.0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(
        ("quick", "slow"), LEAST_ROUNDS
    )
    assert min(times["slow"]) >= 0.002 > min(times["quick"])
    assert calls[:4] == ["quick", "quick", "slow", "slow"]  # twice to warm up
    assert calls[4:8] == ["quick", "slow", "slow", "quick"]


def test_a_real_model_is_compared(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    inputs, targets = torch.randint(31, (2, 2, 12))
    found = compare(
        tmp_path, inputs, targets, dtype=torch.float32, device=torch.device("cpu"), new_tokens=3,
        seconds=0.0,
    )  # fmt: skip
    assert found.holds
    assert [row.name for row in found.differences] == ["logits", "gradients"]
    assert all(0 <= row.absolute < 1e-5 for row in found.differences)
    assert len(found.report.swapped) == 2 * 4 + 1
    assert [row.name for row in found.speeds] == [
        "forward, accelerated",
        "generate 3 tokens, accelerated",
        "generate 3 tokens, fastattn.GPT",
        "training step, accelerated",
    ]
    for row in found.speeds:
        assert row.ratio == pytest.approx(row.original / row.ours)
        assert row.rounds >= LEAST_ROUNDS
