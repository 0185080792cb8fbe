"""Fingerprints tell runs and batches apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn.nn import PackedSequences
from fastattn.training.contract import Batch
from fastattn.training.fingerprints import (
    as_json,
    batches_digest,
    difference,
    model_fingerprint,
)

ARGUMENTS: dict[str, Any] = {
    "input_ids": torch.arange(6).view(2, 3),
    "packed": PackedSequences(torch.tensor([0, 2, 6]), 4),
    "scale": 0.5,
}


def _digest(**changes: Any) -> str:
    return batches_digest([Batch({**ARGUMENTS, **changes}, 1, 1)])


def test_a_batch_has_its_hash_whatever_its_strides() -> None:
    same = torch.arange(6).view(2, 3).t().contiguous().t()
    assert _digest() == _digest(input_ids=same) and len(_digest()) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": torch.tensor([[0, 1, 2], [3, 4, 6]])},
        {"input_ids": torch.arange(6).view(3, 2)},
        {"input_ids": torch.arange(6, dtype=torch.int32).view(2, 3)},
        {"packed": PackedSequences(torch.tensor([0, 3, 6]), 4)},
        {"packed": PackedSequences(torch.tensor([0, 2, 6]), 5)},
        {"scale": 0.25},
        {"mask": torch.ones(1)},
    ],
    ids=str,
)  # fmt: skip
def test_another_batch_has_another(changes: dict[str, Any]) -> None:
    assert _digest(**changes) != _digest()


def test_differences_are_named_with_both_values() -> None:
    saved = {"model": {"config": {"n_layer": 2, "norm": "rms_norm"}, "class": "GPT"}, "data": [1]}
    assert difference(saved, saved) is None
    now: Any = {
        "model": {"config": {"n_layer": 3, "norm": "rms_norm"}, "class": "GPT"},
        "data": [1],
    }
    assert difference(saved, now) == "model.config.n_layer is 2 there and 3 here"
    assert difference(saved, {"model": saved["model"]}) == "data is only there"
    assert difference({}, {"lora": {"rank": 4}}) == "lora is only here"


def test_the_version_of_transformers_does_not_count() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1)
    subject = torch.nn.Linear(1, 1)
    subject.config = config
    before = as_json(model_fingerprint(subject, {}))
    assert before["config"]["n_layer"] == 1
    config.transformers_version, config._name_or_path = "9.9", "elsewhere"
    assert as_json(model_fingerprint(subject, {})) == before
