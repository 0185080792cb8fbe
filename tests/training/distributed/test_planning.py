"""Plans: sizes against real models, memory and messages against real processes, laws of the search."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import scaling

import fastattn
from fastattn.chips import DEVICES, peak_flops
from fastattn.training.distributed.planning import (
    Job,
    Message,
    Numbers,
    Shape,
    Split,
    config_for,
    memory,
    messages,
    plans,
)
from fastattn.training.distributed.planning.shapes import PUBLISHED, number
from fastattn.training.runs.estimate import flops_per_token

ROOT = Path(__file__).parents[3]
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
FAMILIES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "head_bias": True, "norm_placement": "both"},
    {"positions": "rotary", "gated": True, "n_kv_head": 2, "head_size": 6, "n_inner": 37},
    {"norm": "rms_norm", "qk_norm": "head", "qkv_bias": False, "out_bias": False},
    {"qk_norm": "all", "n_kv_head": 1, "mlp_bias": False},
]
SMALL = Shape(fastattn.GPTConfig.preset("gpt2"))


def near(measured: float, share: float) -> Any:
    return pytest.approx(measured, rel=share)


@pytest.mark.parametrize("changes", FAMILIES)
def test_sizes_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = fastattn.GPTConfig(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=3, n_head=4, **SPECIAL, **changes
    )
    model, shape = fastattn.GPT(config, device="meta"), Shape(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert shape.block.of_rank(1) == block
    matrices = sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)
    assert shape.matrices == matrices
    assert shape.flops(16) == flops_per_token(model, 16)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_sizes(text: str) -> None:
    assert near(number(text), 0.05) == Shape(config_for(text)).parameters


@pytest.mark.parametrize("text", ["125m", "350M", "2.7B", "13e9", "405B", "1t"])
def test_other_sizes_are_near(text: str) -> None:
    config = config_for(text)
    assert near(number(text), 0.05) == Shape(config).parameters
    assert 64 <= config.n_embd / config.n_layer <= 192


@pytest.mark.parametrize(
    "text", ["7x", "", "B", "-7B", "0", "1e999", "7..5B", "1e3B B", "nan", "٧B"]
)
def test_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="no number"):
        config_for(text)


# --- against processes ----------------------------------------------------------------------------


def check(case: scaling.Case) -> None:
    (predicted, sent), (measured, really) = case.predicted(), case.measured()
    assert near(measured, 0.1) == predicted
    assert sent.keys() == really.keys()
    for kind, size in really.items():
        assert near(size, 1e-3) == sent[kind], kind


def test_memory_and_messages_of_two_processes() -> None:
    check(scaling.Case("Llama", Split(shard=2, batch=2, recompute=True), length=128, backwards=2))


@pytest.mark.long
@pytest.mark.parametrize("case", scaling.CASES, ids=str)
def test_memory_and_messages(case: scaling.Case) -> None:
    check(case)


# --- memory ---------------------------------------------------------------------------------------


def test_weights_and_states_are_divided() -> None:
    whole = memory(SMALL, Split(), Numbers(), 64)
    assert whole.weights == 4 * SMALL.parameters and whole.states == 2 * whole.weights
    for parts in (2, 8, 64):
        part = memory(SMALL, Split(shard=parts), Numbers(), 64)
        assert part.weights == whole.weights / parts and part.states == whole.states / parts
    copies = memory(SMALL, Split(replicate=8), Numbers(), 64)
    assert copies.weights == whole.weights and copies.gradients > whole.gradients  # buckets
    average = memory(SMALL, Split(), Numbers(average=True), 64)
    assert average.states == 3 * whole.weights
    muon = memory(SMALL, Split(), Numbers(muon=True), 64)
    assert whole.states - muon.states == 4 * SMALL.config.n_layer * SMALL.matrices


@pytest.mark.parametrize("split", [Split(), Split(shard=8), Split(4, 2), Split(1, 4, 2, 2)])
def test_checkpointing_and_smaller_batches_take_less(split: Split) -> None:
    def total(**changes: Any) -> float:
        return memory(SMALL, split._replace(**changes), Numbers(), 1024).total

    assert total(recompute=True) <= total() <= total(batch=2) < total(batch=4)
    assert total(batch=8, recompute=True) < total(batch=8)


# --- messages and time ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "processes", "stride", "seconds"),
    [
        # Inside a machine: NVLink.
        ("gather", 8e9, 8, 1, 8e9 * 7 / 8 / 450e9 + 7 * 3.4e-6),
        ("reduce", 8e9, 4, 2, 2 * (8e9 * 3 / 4 / 450e9 + 3 * 3.4e-6)),
        # Eight cards carry the rings of a machine's eight; of every eighth GPU one.
        ("scatter", 8e9, 16, 1, 8e9 * 15 / 16 / 400e9 + 14 * 3.4e-6 + 14e-6),
        ("gather", 8e9, 16, 8, 8e9 * 15 / 16 / 50e9 + 15 * 14e-6),
        # A tree of 128 machines.
        ("reduce", 8e9, 1024, 1, 2 * (8e9 * 1023 / 1024 / 400e9 + 7 * 4e-6 + 7 * 14e-6)),
        ("pass", 9e8, 4, 1, 9e8 / 450e9 + 3.4e-6),
        ("pass", 5e7, 4, 8, 5e7 / 50e9 + 14e-6),
    ],
)
def test_seconds_of_a_message(
    kind: str, size: float, processes: int, stride: int, seconds: float
) -> None:
    message = Message("weights", kind, False, size, 3, processes, stride)
    assert near(3 * seconds, 1e-9) == message.seconds(DEVICES["H100"], 1.0)
    half = message.seconds(DEVICES["H100"], 0.5)
    assert seconds * 3 < half < seconds * 6


def test_one_process_sends_nothing() -> None:
    assert not list(messages(SMALL, Split(batch=4), Numbers(), 64, 3))


def test_every_device_has_a_peak() -> None:
    assert all(peak_flops(name) for name in DEVICES)


# --- the search -----------------------------------------------------------------------------------


def job(params: str = "1.5B", devices: int = 16, **changes: Any) -> Job:
    values: dict[str, Any] = {"length": 1024, "sequences": 256, **changes}
    return Job(Shape(config_for(params)), devices, **values)


def test_every_split_is_there_once() -> None:
    found = [plan.split[:4] for plan in plans(job())]
    config = config_for("1.5B")
    expected = {
        sizes
        for sizes in itertools.product((1, 2, 4, 8, 16), repeat=4)
        if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 16 and config.n_head % sizes[3] == 0
    }
    assert len(found) == len(set(found)) and set(found) == expected


@pytest.mark.parametrize("devices", [6, 16])
def test_the_first_is_the_fastest_that_fits(devices: int) -> None:
    found = plans(job("7B", devices, sequences=96))
    fitting = [plan for plan in found if plan.fits]
    assert fitting and found[: len(fitting)] == fitting and len(fitting) < len(found)
    fastest = min(plan.seconds.step for plan in fitting)
    assert found[0].seconds.step <= 1.01 * fastest
    for plan in found:
        assert plan.split.devices == devices
        assert plan.split.readers * plan.split.batch * plan.backwards == 96
        assert plan.seconds.step >= plan.seconds.products > 0
        assert 0 < plan.utilisation <= plan.job.efficiency


def test_given_numbers_are_kept() -> None:
    found = plans(job("7B", fixed={"context": 4, "replicate": 2}))
    assert {plan.split.context for plan in found} == {4}
    assert {plan.split.replicate for plan in found} == {2}


def test_a_slower_network_is_slower_and_less_memory_is_less() -> None:
    best = plans(job("7B", 64))[0]
    assert plans(job("7B", 64, links=0.05))[0].seconds.step > best.seconds.step
    assert plans(job("7B", 64, efficiency=0.25))[0].seconds.step > 1.9 * best.seconds.step
    tight = plans(job("7B", 8, usable=0.22))
    assert tight[0].memory.total <= tight[0].job.room or not tight[0].fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chip": "H10O"}, "did you mean H100"),
        ({"chip": "TPU"}, "must be one of A100"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"length": 2048}, "n_positions = 1024"),
        ({"efficiency": 0.0}, "efficiency must be in"),
        ({"links": float("nan")}, "links must be in"),
        ({"fixed": {"tensor": 3}}, "tensor=3 does not divide the 16"),
        ({"fixed": dict.fromkeys(("replicate", "shard", "context", "tensor"), 1)}, "make 1 proc"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_devices_that_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=r"7 devices cannot be divided: .*256 sequences.*25 heads"):
        plans(job(devices=7))


def test_the_page_has_these_predictions() -> None:
    """Of every case, with a measurement that is within 10%."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for case in scaling.CASES:
        total, sent = case.predicted()
        memory_, sent_ = f"{total / 1e6:.1f} MB", f"{sum(sent.values()) / 1e6:.1f} MB"
        row = next(line for line in page.splitlines() if line.startswith(scaling.described(case)))
        *_, predicted, _, ratio, sends, sent_really, _ = (cell.strip() for cell in row.split("|"))
        assert (predicted, sends, sent_really) == (memory_, sent_, sent_)
        assert 0.9 <= float(ratio) <= 1.1
