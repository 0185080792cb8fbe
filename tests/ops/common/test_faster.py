"""The table of what `cuda` was measured to be faster at: without a row it is not chosen."""

from __future__ import annotations

import datetime
import types
from typing import Any

import pytest
import torch

from fastattn import backends
from fastattn.ops.attention import interface as attention_interface
from fastattn.ops.attention.cache import interface as cache_interface
from fastattn.ops.common import faster
from fastattn.ops.common.faster import Faster
from fastattn.ops.common.slower import Key
from fastattn.ops.ffn import interface as ffn_interface
from fastattn.ops.layer_norm import interface as norm_interface

GPU = "NVIDIA H200"
KEY = Key("ffn", "cuda", "bfloat16", False, GPU)


def problem(elements: Any = 50) -> Any:
    return types.SimpleNamespace(
        op="ffn", dtype=torch.bfloat16, needs_grad=False, elements=elements,
        device=torch.device("cuda", 0),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster, "devices", lambda device: (GPU, "sm_90"))
    monkeypatch.setattr(faster, "TABLE", {})


def test_rows_name_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real table: a key that nothing has would never be found."""
    monkeypatch.undo()
    for key, row in faster.TABLE.items():
        of = Key(*key)
        assert of.op in ("attention", "attention_with_kv_cache", "ffn", "layer_norm", "rms_norm")
        assert of.backend == "cuda" and row.than in backends.NAMES
        assert isinstance(getattr(torch, of.dtype), torch.dtype)
        assert (of.needs_grad is None) == of.op.endswith("norm")
        datetime.date.fromisoformat(row.date)


def test_every_op_asks_it() -> None:
    for module in (attention_interface, ffn_interface, norm_interface, cache_interface):
        first, *others = module.BACKENDS
        assert first.name == "cuda" and first.slower is faster.declined
        assert all(backend.slower is not faster.declined for backend in others)


def test_what_nobody_measured_is_not_chosen() -> None:
    reason = "not measured on this GPU: name backend='cuda' to use it"
    assert faster.declined("cuda", problem()) == reason
    faster.TABLE[KEY._replace(dtype="float16")] = Faster("triton", "2026-11-26")
    assert faster.declined("cuda", problem()) == reason


def test_features_that_are_not_measured() -> None:
    faster.TABLE[KEY] = Faster("triton", "2026-11-26")
    assert "not measured with these features" in str(faster.declined("cuda", problem(None)))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({}, None),
        ({"above": 50, "below": 50}, None),
        ({"above": 51}, "not faster than triton below 51 elements (NVIDIA H200, 2026-11-26)"),
        ({"below": 49}, "not faster than triton above 49 elements (NVIDIA H200, 2026-11-26)"),
    ],
)
def test_limits(
    limits: dict[str, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster.TABLE[KEY] = Faster("triton", "2026-11-26", **limits)
    assert faster.declined("cuda", problem()) == reason
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert faster.declined("cuda", problem()) is None  # whatever the size


def test_a_row_of_an_architecture() -> None:
    faster.TABLE[KEY._replace(device="sm_90")] = Faster("triton", "2026-11-26")
    assert faster.declined("cuda", problem()) is None


def test_the_size_of_a_step_of_decoding() -> None:
    q, cache = torch.randn(2, 3, 4, 8), torch.randn(2, 16, 2, 8)
    described = cache_interface.describe(q, cache, cache, torch.tensor([3, 4]))
    assert (described.op, described.needs_grad) == ("attention_with_kv_cache", False)
    assert (described.dtype, described.elements) == (torch.float32, 2 * 3 * 4 * 8)
