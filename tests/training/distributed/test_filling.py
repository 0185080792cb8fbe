"""A model that is divided before it has weights: the same parts, of less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from training import small
from training.distributed import filling_tasks as tasks
from training.runs.test_run import DECODER, tables

import fastattn
from fastattn.models.drawing import drawn
from fastattn.models.loading import load

LAYOUTS = [
    pytest.param(2, {"shard": 2}, id="FSDP"),
    pytest.param(2, {"tensor": 2}, id="TP"),
    pytest.param(3, {"shard": 3}, id="FSDP-3", marks=pytest.mark.long),
    pytest.param(4, {"shard": 2, "tensor": 2}, id="FSDP-TP", marks=pytest.mark.long),
    pytest.param(4, {"replicate": 2, "shard": 2}, id="HSDP", marks=pytest.mark.long),
]


@pytest.mark.parametrize("how", [{}, {"n_kv_head": 1, **small.LLAMA, "norm": "offset_rms_norm"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_weights_are_those_of_a_model(how: dict[str, Any], dtype: torch.dtype) -> None:
    config = small.model(**how).config
    torch.manual_seed(3)
    model = fastattn.GPT(config).to(dtype)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    late, weights = drawn(config, dtype)
    assert all(parameter.is_meta and parameter.dtype == dtype for parameter in late.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for _ in range(2):  # again, wherever the generator is
        assert small.same(dict(weights()), dict(model.named_parameters()))
        torch.rand(3)


@pytest.mark.parametrize("how", [{}, small.LLAMA])
def test_read_weights_are_those_of_a_model(how: dict[str, Any], tmp_path: Path) -> None:
    model = small.model(**how)
    model.save_pretrained(tmp_path)
    late, weights = fastattn.GPT.deferred(tmp_path, dtype=torch.float64)
    assert all(parameter.is_meta for parameter in late.parameters()) and not late.training
    read = load(tmp_path, dtype=torch.float64)
    assert late.config == read.config and late.family == read.family
    assert small.same(dict(weights()), dict(read.named_parameters()))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="GPT-2", marks=pytest.mark.long),
        pytest.param(small.LLAMA, id="Llama"),
    ],
)
@pytest.mark.parametrize(("count", "numbers"), LAYOUTS)
def test_parts_are_those_of_a_whole_model(
    count: int, numbers: dict[str, Any], how: dict[str, Any]
) -> None:
    assert processes.run(count, tasks.parts, numbers, how) == [[True] * 3] * count


def test_a_rank_of_another_seed_is_named() -> None:
    for said in processes.run(2, tasks.differing):
        assert "rank 1 of 2 has other weights at the start" in said


@pytest.mark.parametrize(
    ("numbers", "source"),
    [
        ({"shard": 2}, "drawn"),
        ({"tensor": 2}, "read"),
        pytest.param({"tensor": 2}, "drawn", marks=pytest.mark.long),
        pytest.param({"shard": 2}, "read", marks=pytest.mark.long),
    ],
)
def test_no_process_has_the_whole_model(
    numbers: dict[str, Any], source: str, tmp_path: Path
) -> None:
    """At most its parts and a few copies of the largest weight; the whole model without."""
    model = fastattn.GPT(tasks.LARGER)
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    folder = None
    if source == "read":
        folder = tmp_path / "model"
        model.save_pretrained(folder)
    for peak, own in processes.run(2, tasks.peak, numbers, True, folder):
        assert own < 0.52 * size
        assert peak < own + 6 * largest < 0.8 * size
    if source == "drawn":
        assert all(peak > size for peak, _ in processes.run(2, tasks.peak, numbers, False, None))


@pytest.mark.long
def test_a_command_of_two_processes(tmp_path: Path) -> None:
    config = tables(tmp_path, {"name": "causal"}, config=DECODER, device="cpu")
    config["training"]["accumulation"] = 2
    losses = {}
    for count, shard in ((1, 1), (2, 2)):
        config["distributed"] = {"shard": shard}
        config["output"]["folder"] = str(tmp_path / str(count))
        found = processes.run(count, tasks.run, config)
        assert [late for late, _ in found] == [count > 1] * count
        losses[count] = found[0][1]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
