"""The parts of a training run: nothing is lost, and each target is held to its own figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import train
from harness import OURS

from fastattn.timing import Sample


def cell(part: str, **axes: Any) -> Any:
    return train.make(
        **{"device": "cpu", "part": part, "model": "tiny", "batch": 2, "seqlen": 12, **axes}
    )


@pytest.mark.parametrize("part", [train.PACKING, train.CHECKPOINT])
def test_a_part_is_measured_whole(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "VOCABULARY", 300)
    monkeypatch.setattr("harness.ATTEMPTS", 1)
    monkeypatch.setattr(train.PartCell, "rounds", 2)
    monkeypatch.setattr(train, "STEPS", 2)
    train.trained_tokenizer.cache_clear()
    subject = cell(part)
    row = subject.measure(seconds=0.0)
    assert row["right"] and row["target"] == subject.target and "holds" in row
    assert all(entry["rounds"] for entry in row["peers"].values())
    train.trained_tokenizer.cache_clear()


def test_padded_batches_have_every_document_once() -> None:
    documents = [torch.arange(1, n + 1) for n in (5, 30, 2, 12, 13)]
    batches = cell(train.PACKING).padded(documents)
    rows = [row for ids, _ in batches for row in ids]
    assert [row[row > 0].tolist() for row in rows] == [d[:12].tolist() for d in documents]
    for ids, targets in batches:
        counted = targets >= 0
        assert torch.equal(targets[:, :-1][counted[:, :-1]], ids[:, 1:][counted[:, :-1]])


@pytest.mark.parametrize(
    ("part", "peer", "least"),
    [(train.STEP, train.TRANSFORMERS, 1.2), (train.PACKING, train.PADDED, 1.5)],
)
def test_a_target_is_a_ratio(part: str, peer: str, least: float) -> None:
    times = {OURS: Sample((1.0, 1.0), 1), peer: Sample((least, least), 1)}
    assert cell(part).holds(times)
    assert not cell(part).holds({**times, peer: Sample((least - 0.01,) * 2, 1)})


def test_a_checkpoint_may_take_a_share_of_the_default_interval() -> None:
    assert cell(train.CHECKPOINT).holds({OURS: Sample((12.0,), 1)})  # 2% of ten minutes
    assert not cell(train.CHECKPOINT).holds({OURS: Sample((12.1,), 1)})


def test_shards_are_judged_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = cell(train.SHARDS)
    for count in (1, 4):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, count=count: set(range(count)))
        assert subject.holds({OURS: Sample((subject.size / count / 1.01e6,), 1)})
        assert not subject.holds({OURS: Sample((subject.size / count / 0.99e6,), 1)})
