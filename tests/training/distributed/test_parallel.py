"""A run on several processes is the run on one: loss, gradients, weights, the order of the data."""

from __future__ import annotations

import socket
from typing import Any

import processes
import pytest
import torch
from training import small
from training.distributed import tasks

from fastattn.training.distributed.processes import LostProcessError, joined
from oracle import assert_all_close_to_reference

LAYOUTS = [
    pytest.param(2, {"replicate": 2}, id="DDP"),
    pytest.param(2, {"shard": 2}, id="FSDP"),
    pytest.param(2, {"tensor": 2}, id="TP"),
    pytest.param(4, {"shard": 2, "tensor": 2}, id="FSDP-TP", marks=pytest.mark.long),
    pytest.param(4, {"replicate": 2, "tensor": 2}, id="DP-TP", marks=pytest.mark.long),
    pytest.param(4, {"replicate": 2, "shard": 2}, id="HSDP", marks=pytest.mark.long),
    pytest.param(3, {}, id="FSDP-3", marks=pytest.mark.long),
    pytest.param(2, {"context": 2}, id="CP"),
    pytest.param(4, {"replicate": 2, "context": 2}, id="DDP-CP", marks=pytest.mark.long),
    pytest.param(4, {"shard": 2, "context": 2}, id="FSDP-CP", marks=pytest.mark.long),
]
# Five batches for two processes: one of them runs a batch in vain.
UNEVEN = {"accumulation": 5, "steps": 6, "evaluation_interval": 4}


@pytest.mark.parametrize(
    ("count", "numbers"),
    [
        *LAYOUTS,
        pytest.param(4, {"context": 2, "tensor": 2}, id="CP-TP", marks=pytest.mark.long),
    ],
)
def test_gradients_are_those_of_one_process(count: int, numbers: dict[str, Any]) -> None:
    """Of five batches with different numbers of targets; under tensor parallelism of a Llama."""
    changes, how = {"accumulation": 5}, small.LLAMA if "tensor" in numbers else {}
    exact_loss, exact = _float64(changes, how)
    eager_loss, eager = processes.run(1, tasks.gradients, {}, changes, how)[0]
    for loss, ours in processes.run(count, tasks.gradients, numbers, changes, how):
        assert loss == pytest.approx(exact_loss, abs=2 * abs(eager_loss - exact_loss) + 1e-6)
        assert ours.keys() == exact.keys()
        assert_all_close_to_reference(
            {name: (ours[name], eager[name], exact[name]) for name in exact}
        )


@pytest.mark.parametrize(("count", "numbers"), LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"ema_decay": 0.9, "activation_checkpointing": True}, id="average"),
        pytest.param({"precision": "bfloat16"}, id="bfloat16", marks=pytest.mark.long),
        pytest.param({"optimizer": "muon"}, id="muon", marks=pytest.mark.long),
    ],
)
def test_a_run_is_the_same(count: int, numbers: dict[str, Any], changes: dict[str, Any]) -> None:
    # Sums are rounded in another order; bfloat16 multiplies what that makes of it.
    close = 1e-5 if "precision" not in changes and "optimizer" not in changes else 2e-2
    changes = {**UNEVEN, **changes}
    # Processes that share a layer drop attention weights of their own heads, and those that share
    # a sequence what they read of it.
    how = {"dropout": 0.0 if "context" in numbers else 0.1}
    if "tensor" in numbers:
        how["attn_pdrop"] = 0.0
    weights, steps, losses = processes.run(1, tasks.trained, {}, changes, how)[0]
    found = processes.run(count, tasks.trained, numbers, changes, how)
    for theirs, their_steps, their_losses in found:
        for (loss, norm, tokens), (their_loss, their_norm, their_tokens) in zip(steps, their_steps):
            assert their_tokens == tokens == 5 * 4 * 16
            assert their_loss == pytest.approx(loss, rel=close)
            assert their_norm == pytest.approx(norm, rel=close * 10)
        assert their_losses == pytest.approx(losses, rel=close)
        if changes.get("precision") == "bfloat16":
            continue  # AdamW makes steps of one size of a gradient that is rounding only
        for name, tensor in weights.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=close * 10, atol=close)
    first, *others = [theirs for theirs, _, _ in found]
    assert all(small.same(first, other) for other in others)


@pytest.mark.parametrize(
    ("count", "numbers", "calls"),
    [
        pytest.param(2, {"replicate": 2}, [3, 2], id="DDP"),
        pytest.param(2, {"shard": 2}, [3, 3], id="FSDP"),  # who has no batch runs one in vain
        pytest.param(2, {"context": 2}, [5, 5], id="CP", marks=pytest.mark.long),
        pytest.param(4, {"replicate": 2, "shard": 2}, [2] * 4, id="HSDP", marks=pytest.mark.long),
        pytest.param(4, {"shard": 2, "tensor": 2}, [3] * 4, id="FSDP-TP", marks=pytest.mark.long),
    ],
)
def test_a_validation_is_divided(count: int, numbers: dict[str, Any], calls: list[int]) -> None:
    """Five batches of 64 tokens, the last smaller: the figures have the bits of one process."""
    expected, once = processes.run(1, tasks.evaluated, {}, 300, 0)[0]
    assert once == 5
    found = processes.run(count, tasks.evaluated, numbers, 300, 0)
    assert [called for _, called in found] == calls
    for measures, _ in found:
        assert measures == (pytest.approx(expected, rel=1e-6) if "tensor" in numbers else expected)


@pytest.mark.parametrize(
    ("length", "tokens"), [(300, 100), pytest.param(60, 0, marks=pytest.mark.long)]
)
def test_a_validation_ends_where_it_does_on_one_process(length: int, tokens: int) -> None:
    """After two of the batches; and there is one batch for two processes."""
    expected, _ = processes.run(1, tasks.evaluated, {}, length, tokens)[0]
    for measures, _ in processes.run(2, tasks.evaluated, {"shard": 2}, length, tokens):
        assert measures == expected


@pytest.mark.parametrize("numbers", [{"replicate": 2}, {"shard": 2}])
@pytest.mark.parametrize("what", ["seed", "config"])
def test_a_rank_that_differs_is_named(numbers: dict[str, Any], what: str) -> None:
    for said in processes.run(2, tasks.differing, numbers, what):
        assert "rank 1 of 2" in said
        assert ("training.seed is 0 there" in said) == (what == "config")


def test_a_flipped_bit_is_found() -> None:
    """The next update moves the other weights alike, so that the bit stays."""
    for said in processes.run(2, tasks.differing, {"replicate": 2}, "weight"):
        assert "rank 1 of 2 has other weights after step 3" in said
        assert "blocks.1.attention.out_proj.weight" in said


def test_a_rank_that_dies_in_a_step_is_missed_at_once() -> None:
    with pytest.raises(processes.Failed) as caught:
        processes.run(2, tasks.dying, seconds=30)
    assert "LostProcessError: another process of this run has ended" in str(caught.value)
    assert "rank 1 died with exit code 1" in str(caught.value)


def test_what_does_not_fit_is_refused_on_all() -> None:
    cases: dict[str, Any] = {
        "make 3 processes, and there are 2: start torchrun": ({"replicate": 3}, {}, "causal"),
        "make 4 processes, and there are 2": (
            {"tensor": 2, "context": 2, "shard": 1},
            {},
            "causal",
        ),
        "=1 batches a step are too few": ({"replicate": 2}, {"accumulation": 1}, "causal"),
        '"bfloat16"': ({"shard": 2}, {"precision": "float16"}, "causal"),
        "offload=true needs GPUs": ({"shard": 2, "offload": True}, {}, "causal"),
        "'distillation' reads whole sequences: set": ({"context": 2}, {}, "distillation"),
    }
    for said in processes.run(2, tasks.refused, list(cases.values())):
        assert all(words in one for words, one in zip(cases, said, strict=True)), said


def test_an_error_on_one_is_an_error_on_all() -> None:
    other = "RuntimeError: rank 1 of 2: the disk is full"
    own = "ValueError: the disk is full"
    assert processes.run(2, tasks.together) == [[other, other, "[0]"], [own, own, "[2]"]]


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    _environment(monkeypatch, processes.free_port())
    monkeypatch.setattr("fastattn.training.distributed.processes.JOIN_SECONDS", 1.0)
    with pytest.raises((LostProcessError, RuntimeError), match=r"rank 1 of 2|cannot meet"):
        joined("cpu").__enter__()


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _environment(monkeypatch, taken.getsockname()[1])
        with pytest.raises(RuntimeError, match=r"cannot meet at 127.0.0.1:.*torchrun --standalone"):
            joined("cpu").__enter__()


def _environment(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    values = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def _float64(changes: dict[str, Any], how: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the step as they are, by float64 on one process."""
    subject = small.model(**how).double()
    config = small.with_changes(**changes)
    data = tasks.Holed(small.STREAM, config.batch_size, config.context)
    batches = [data.batch(number) for number in range(config.accumulation)]
    counted = sum(batch.counted for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        total = total + small.OBJECTIVE.loss(subject, batch) * (batch.counted / counted)
    total.backward()
    found = {name: p.grad for name, p in subject.named_parameters()}
    return total.item(), {name: grad for name, grad in found.items() if grad is not None}
