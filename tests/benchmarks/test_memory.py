"""Memory: known expressions are counted right, and it grows with the sequence, not its square."""

from __future__ import annotations

import dataclasses
from typing import Any

import attention
import counting
import gpt_models
import gpt_train
import memory
import pytest
import schema
import torch
from peer import Peer

MIB = 1 << 20


def cell(op: str = "attention", **axes: Any) -> Any:
    sizes = {"batch": 1, "seqlen": 1024, "heads": 2, "head_dim": 64, "causal": True, "rows": 256}
    sizes |= {
        "hidden": 128,
        "classes": 33000,
        "model": "tiny",
        "direction": "forward+backward",
        "compile": False,
    }
    return memory.make(op=op, **{**sizes, "device": "cpu", "dtype": "float32", **axes})


# --- counting -----------------------------------------------------------------------------------


def test_peak_of_known_expressions() -> None:
    x = torch.randn(MIB // 4)
    out = []
    for call, count in (
        (lambda: x + 1, 1),
        (lambda: (x + 1) * 2, 2),  # the sum is there while the product is made
        (lambda: (x + 1).mul_(2), 1),
        (lambda: (x + 1).sum() + (x + 1).sum(), 1),  # the first sum's terms are gone by then
        (lambda: torch.cat([x + 1, x + 2]), 4),
        (lambda: out.append(x + 1), 1),  # kept after the call
        (lambda: out.clear(), 0),  # what was there before is freed
    ):
        assert count * MIB <= counting.peak_bytes(call, "cpu") < count * MIB + 1024


def test_saved_of_known_expressions() -> None:
    x = torch.randn(MIB // 4, requires_grad=True)
    w = torch.randn(MIB // 4, requires_grad=True)
    for forward, count in (
        (lambda: x + w, 0),
        (lambda: x * w, 0),  # both are given
        (lambda: x.exp(), 1),  # its result
        (lambda: x.exp().view(2, -1).exp(), 2),
        (lambda: (lambda y: (y * w) * y[None])(x.exp()), 2),  # exp once, the product once
        (lambda: (x[: MIB // 8] * 1.5).exp(), 0.5),
    ):
        assert counting.saved_bytes(forward, [x, w]) == count * MIB


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", memory.OPS)
def test_every_row_is_right(op: str) -> None:
    if op == "gpt":
        pytest.importorskip("transformers")
    row = cell(op, seqlen=32 if op == "gpt" else 1024).measure(0.0)
    schema.check(schema.finite(row), schema.Row)
    assert row["right"] and row.get("holds", True)
    for name, entry in row["peers"].items():
        assert entry["peak_bytes"] > 0 and entry["saved_bytes"] >= 0, name
        assert "times_ours" not in entry and "median_us" not in entry
    ours, eager = (row["peers"][n] for n in ("ours", "transformers" if op == "gpt" else "eager"))
    assert ours["peak_bytes"] <= eager["peak_bytes"]
    assert ours["saved_bytes"] <= eager["saved_bytes"]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_the_promise_is_linear_and_the_score_matrix_breaks_it(direction: str) -> None:
    eager = {"ours": attention.eager}
    row = dataclasses.replace(cell(direction=direction), against=eager).measure(0.0)
    assert row["right"] and row["holds"] is False
    assert "linear in seqlen" in row["target"]


def test_limits_are_those_of_the_formula() -> None:
    """2 heads of 64 in float32: q, k, v and out have 512 bytes a token each, lse 8."""
    forward, both = cell(direction="forward"), cell()
    assert forward.peak_limit - memory.WORKSPACE == 1024 * (4 * 512 + 8)
    assert both.peak_limit - memory.WORKSPACE == 1024 * (8 * 512 + 16)
    assert both.saved_limit - memory.STATE == 1024 * (512 + 16)
    halves = cell(dtype="bfloat16")  # gradients in float32 all the same
    assert halves.peak_limit - memory.WORKSPACE == 1024 * (4 * 256 + 4 * 512 + 16)
    for limit in ("peak_limit", "saved_limit"):
        one, two, three = (getattr(cell(seqlen=n), limit) for n in (1024, 2048, 3072))
        assert two - one == three - two


def test_a_step_counts_gradients_but_no_weights() -> None:
    pytest.importorskip("transformers")
    against = {"ours": gpt_train.ours}
    row = dataclasses.replace(cell("gpt", batch=1, seqlen=2), against=against).measure(0.0)
    weights = 4 * (gpt_models.parameters("tiny") + 64 * 64)
    assert weights < row["peers"]["ours"]["peak_bytes"] < 1.5 * weights


def test_ours_broken_is_not_right() -> None:
    def broken(of: Any) -> Peer:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    row = dataclasses.replace(cell(), against={"ours": broken}).measure(0.0)
    assert row["right"] is False and row["holds"] is False
    assert "1 TiB" in row["peers"]["ours"]["error"]
