"""Training and generation of a GPT: every peer is checked, a wrong one is seen, rates are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import schema
import torch
from torch import Tensor

pytest.importorskip("transformers")

import gpt_generate
import gpt_train
from gpt_generate import Writer
from gpt_models import Models
from gpt_train import Learner

from fastattn.timing import Sample

QUICK = 0.01  # seconds of timing


def training(**axes: Any) -> gpt_train.TrainCell:
    sizes = {"model": "tiny", "batch": 2, "seqlen": 12, "dropout": 0.0, "compile": False}
    sizes |= {"device": "cpu", "dtype": "float32"}
    cell = gpt_train.make(**{**sizes, **axes})
    assert cell is not None
    return cell


def generation(**axes: Any) -> gpt_generate.GenerateCell:
    sizes = {"model": "tiny", "prompts": 2, "prompt": 8, "new_tokens": 6, "unequal": False}
    sizes |= {"compile": False, "device": "cpu", "dtype": "float32"}
    cell = gpt_generate.make(**{**sizes, **axes})
    assert cell is not None
    return cell


def sample(*seconds: float) -> Sample:
    return Sample(seconds, 1)


# --- rows ---------------------------------------------------------------------------------------


def measured(cell: Any, rate: str) -> dict[str, Any]:
    """The entries of the peers, all of which are right and have a rate; without the ceiling."""
    row: Any = schema.finite(cell.measure(QUICK))
    schema.check(row, schema.Row)
    assert row["right"] and "holds" in row
    assert row["peers"].keys() == cell.against.keys() | {cell.bound}
    for name, entry in row["peers"].items():
        assert entry.get("ceiling", entry.get("right")), (name, entry)
        assert entry[rate] > 0 and entry["share"] > 0, name
    return {name: entry for name, entry in row["peers"].items() if name != cell.bound}


@pytest.mark.parametrize("axes", [{}, {"dropout": 0.1}, {"dtype": "bfloat16"}], ids=str)
def test_every_learner_is_right_and_measured(axes: dict[str, Any]) -> None:
    for name, entry in measured(training(**axes), "tflops").items():
        assert entry["tokens_per_second"] > 0 and entry["peak_bytes"] > 0, name
        assert entry["first_call_seconds"] > 0 and "mfu" not in entry, name


def test_a_llama_is_written_by_all_but_the_plain_gpt2() -> None:
    row = generation(model="tiny-llama", prompts=3, unequal=True).measure(QUICK)
    right = {name for name, entry in row["peers"].items() if entry.get("right")}
    assert right == gpt_generate.PEERS.keys() - {"gpt-fast"}
    assert "a GPT-2 only" in str(row["peers"]["gpt-fast"])


@pytest.mark.parametrize(
    "axes",
    [{}, {"prompts": 3, "unequal": True}, {"prompts": 1, "dtype": "bfloat16"}],
    ids=str,
)
def test_every_writer_is_right_and_measured(axes: dict[str, Any]) -> None:
    for entry in measured(generation(**axes), "gbps").values():
        assert {"tokens_per_second", "decode_step_us", "first_call_seconds"} <= entry.keys()


def test_unequal_prompts_differ_in_length() -> None:
    cell = generation(prompts=4, prompt=16, unequal=True)
    assert cell.lengths == [16, 12, 8, 4]
    ids, mask = cell.inputs_of(Models("tiny", "cpu"))
    assert mask is not None and mask.sum(1).tolist() == cell.lengths
    assert mask[:, -1].all() and not ids[mask == 0].any()
    assert gpt_generate.make(**{**vars_of(cell), "prompts": 1}) is None


def vars_of(cell: gpt_generate.GenerateCell) -> dict[str, Any]:
    return {**cell.axes, "device": cell.device, "dtype": cell.dtype}


# --- wrong peers --------------------------------------------------------------------------------


def with_forward(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """A learner like transformers', its logits and loss changed."""

    def make(models: Models) -> Learner:
        learner = gpt_train.transformers(models)
        return Learner(learner.model, lambda *tokens: change(*learner.forward(*tokens)))

    return make


def wrong_logits(logits: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return logits + 1e-3, loss  # which the loss does not see


def wrong_loss(logits: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return logits, loss + 1e-3


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("change", [wrong_logits, wrong_loss])
def test_a_wrong_learner_is_timed_and_shown(change: Any, ours: bool) -> None:
    wrong = with_forward(change)
    against = {"ours": wrong if ours else gpt_train.ours, "other": wrong}
    row = dataclasses.replace(training(), against=against).measure(QUICK)
    entry = row["peers"]["other"]
    assert entry["right"] is False and entry["times_ours"]["median"] > 0
    assert ("its loss is" in entry.get("note", "")) == (change is wrong_loss)
    assert row["right"] is not ours
    assert "target" not in row  # those whom it is about take no part


def wrong_writer(models: Models, batch: int, capacity: int) -> Writer:
    write = gpt_generate.transformers(models, batch, capacity)

    def generate(ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
        tokens = write(ids, mask, count).clone()
        tokens[-1, -1] += 1
        return tokens

    return generate


def short_writer(models: Models, batch: int, capacity: int) -> Writer:
    write = gpt_generate.transformers(models, batch, capacity)
    return lambda ids, mask, count: write(ids, mask, count)[:, 1:]


def test_a_wrong_writer_is_timed_and_shown() -> None:
    against = {"ours": gpt_generate.ours, "wrong": wrong_writer, "short": short_writer}
    row = dataclasses.replace(generation(), against=against).measure(QUICK)
    entries = row["peers"]
    assert row["right"] and entries["ours"]["right"]
    assert entries["wrong"]["right"] is False and entries["wrong"]["times_ours"]["median"] > 0
    assert entries["wrong"]["note"] == "1 of 12 tokens differ in float32"
    assert entries["short"]["note"] == "(2, 5) tokens in float32"
    row = dataclasses.replace(generation(), against={"ours": wrong_writer}).measure(QUICK)
    assert row["right"] is False


def test_a_writer_that_sees_the_padding_is_wrong() -> None:
    def blind(models: Models, batch: int, capacity: int) -> Writer:
        write = gpt_generate.transformers(models, batch, capacity)
        return lambda ids, mask, count: write(ids, None, count)

    against = {"ours": gpt_generate.ours, "blind": blind}
    cell = dataclasses.replace(generation(prompts=4, unequal=True), against=against)
    assert cell.measure(QUICK)["peers"]["blind"]["right"] is False


def test_peers_that_fail_stay_in_their_own_entry() -> None:
    def broken(models: Models) -> Learner:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    against = {"ours": gpt_train.ours, "big": broken}
    row = dataclasses.replace(training(), against=against).measure(QUICK)
    assert row["right"]
    assert row["peers"]["big"] == {"refused": "OutOfMemoryError: tried to allocate 1 TiB"}
    row = dataclasses.replace(training(), against={"ours": broken}).measure(QUICK)
    assert row["right"] is False and "1 TiB" in row["peers"]["ours"]["error"]


# --- rates --------------------------------------------------------------------------------------

# 6 x 123,653,376 parameters without positions + 12 layers x 12 x 768 x 1024, for 8 x 1024 tokens.
GPT2_FLOPS = (6 * 123_653_376 + 12 * 12 * 768 * 1024) * 8192


def test_flops() -> None:
    assert training(model="gpt2", batch=8, seqlen=1024).flops == GPT2_FLOPS
    assert pytest.approx(7.0055e12, rel=1e-4) == GPT2_FLOPS


@pytest.mark.parametrize("known", [True, False])
def test_mfu(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 ms a step are 350.3 TFLOP/s: 35.4% of an H100's 989, 50% of what its product reached."""
    name = "NVIDIA H100 80GB HBM3" if known else "A GPU of tomorrow"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    cell = training(model="gpt2", batch=8, seqlen=1024, device="cuda", dtype="bfloat16")
    entries: dict[str, Any] = {"ours": {}, "matmul": {}}
    samples = {"ours": sample(0.01, 0.02, 0.03), "matmul": sample(0.5)}
    cell.rate(entries, samples, product=0.5 * 2 * GPT2_FLOPS / 0.02)
    assert entries["ours"]["tflops"] == pytest.approx(350.28, abs=0.01)
    assert entries["ours"]["tokens_per_second"] == pytest.approx(409_600)
    assert entries["ours"]["share"] == pytest.approx(0.5)
    assert "mfu" not in entries["matmul"]
    if known:
        assert entries["ours"]["mfu"] == pytest.approx(0.3542, abs=1e-4)
        peak = gpt_train.peak("cuda")
        schema.check(peak, schema.Peak)
        assert peak is not None and "not halved" in peak["flops"]
    else:
        assert "mfu" not in entries["ours"] and gpt_train.peak("cuda") is None
        assert "A GPU of tomorrow is not known" in entries["ours"]["note"]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        # Not the chip of that name, or none that is known.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peaks(name: str, tflops: float | None) -> None:
    assert gpt_train.peak_of(name) == tflops


def test_generation_counts_the_weights_once_a_token() -> None:
    """GPT-2 in bfloat16: 247.3 MB a token; 64 tokens in 10 ms are 1583 GB/s."""
    cell = generation(model="gpt2", prompts=16, prompt=64, new_tokens=64, dtype="bfloat16")
    entries: dict[str, Any] = {"ours": {}, "copy": {}}
    samples = {"ours": sample(0.01), "ours, one token": sample(0.00055), "copy": sample(2.5e-4)}
    cell.rate(entries, samples)
    assert entries["ours"]["gbps"] == pytest.approx(64 * 0.247306752 / 0.01)
    assert entries["ours"]["tokens_per_second"] == pytest.approx(102_400)
    assert entries["ours"]["decode_step_us"]["median"] == pytest.approx(150.0)
    assert entries["copy"]["gbps"] == pytest.approx(2 * 0.247306752 / 2.5e-4)
    assert entries["ours"]["share"] == pytest.approx(0.8)


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "accelerated", "holds"),
    [
        ((0.9, 0.9, 0.9), (1.0, 1.0, 1.0), True),
        ((1.01, 1.01, 1.01), (1.0, 1.0, 1.0), True),  # a tie
        ((0.9, 1.1, 1.2), (0.9, 0.9, 0.9), True),  # noise
        ((1.1, 1.1, 1.1), (0.9, 0.9, 0.9), False),
        ((0.9, 0.9, 0.9), (1.1, 1.1, 1.1), False),
        ((0.9, 0.9, 0.9), None, False),
    ],
)
def test_target_of_training(ours: Any, accelerated: Any, holds: bool) -> None:
    samples = {"ours": sample(*ours), "transformers": sample(1.0, 1.0, 1.0)}
    if accelerated is not None:
        samples["accelerated"] = sample(*accelerated)
    assert training().holds(samples) is holds


@pytest.mark.parametrize(
    ("ours", "accelerated", "equal", "unequal"),
    [
        (0.8, 1.0, True, True),
        (0.8, 1.1, False, True),
        (0.85, 1.0, False, False),  # 1.18 times as fast
        (None, 1.0, False, False),
    ],
)
def test_target_of_generation(ours: Any, accelerated: float, equal: bool, unequal: bool) -> None:
    samples = {"transformers": sample(1.0), "accelerated": sample(accelerated)}
    if ours is not None:
        samples["ours"] = sample(ours)
    assert generation().holds(samples) is equal
    assert generation(unequal=True).holds(samples) is unequal


@pytest.mark.parametrize("factor", [0.0, 1e6])
def test_a_row_says_whether_it_holds(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_generate, "FASTER", factor)
    cell = generation(prompts=2, unequal=True)
    row = cell.measure(QUICK, ["transformers", "accelerated"])
    assert row["holds"] is (factor == 0.0)
    assert row["peers"].keys() == {"ours", "accelerated", "transformers", "copy"}


# --- the weights --------------------------------------------------------------------------------


def test_peers_share_the_weights_and_no_step_changes_them() -> None:
    models = Models("tiny", "cpu", dropout=0.1)
    learners = [make(models) for make in gpt_train.PEERS.values()]
    theirs = [learner for learner in learners if hasattr(learner.model, "transformer")]
    weights = {id(learner.model.transformer.wte.weight) for learner in theirs}
    assert len(theirs) == 3 and len(weights) == 1
    ids = models.random_ids(2, 9)
    before = {id(p): p.clone() for x in learners for p in x.model.parameters()}
    for learner in learners:
        gpt_train.training_step(models, learner, ids, torch.float32)()
        for parameter in learner.model.parameters():
            assert torch.equal(parameter, before[id(parameter)])
            assert parameter.grad is None
    assert len({models.optimizer(learner.model) for learner in learners}) == 3


def test_the_padded_vocabulary_is_never_written() -> None:
    """Zero weights give the logit 0, which may well be the largest."""
    models = Models("tiny", "cpu")
    plain = models.plain
    assert plain.vocab_size == 250 and plain.wte.weight.shape[0] == 256
    with torch.no_grad():
        plain.wte.weight[:250] = -plain.wte.weight[:250].abs()
    write = gpt_generate.gpt_fast(models, 2, 12)
    assert write(models.random_ids(2, 4), None, 8).max() < 250
