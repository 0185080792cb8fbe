"""A cell of a benchmark: every peer is checked before it is timed, and none can spoil the row."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import attention
import cross_entropy
import decode
import ffn
import harness
import layer_norm
import peer
import pytest
import rotary
import schema
import torch
from attention import AttentionCell
from harness import BACKWARD, BOTH, DIRECTIONS, FORWARD, Cell
from peer import Peer, Refused

import fastattn.flash_attn
import oracle
from fastattn.timing import Sample


def small(against: dict, direction: str = FORWARD, **options: Any) -> AttentionCell:
    sizes: dict[str, Any] = {"batch": 2, "seqlen": 9, "heads": 2, "kv_heads": 2, "head_dim": 8}
    return AttentionCell(
        op="attention",
        device="cpu",
        dtype="float32",
        direction=direction,
        against=against,
        causal=True,
        **{**sizes, **options},
    )


def out_of_memory(cell: AttentionCell) -> Peer:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    return Peer(attention)


def refusing(cell: AttentionCell) -> Peer:
    raise Refused("not on a Tuesday")


def wrong(cell: AttentionCell) -> Peer:
    return Peer(lambda *inputs: attention.formula(cell, *inputs) + 1e-3)


def misshapen(cell: AttentionCell) -> Peer:
    return Peer(lambda *inputs: attention.formula(cell, *inputs)[:, :1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peers_that_fail_stay_in_their_own_entry(direction: str) -> None:
    against = {
        "ours": attention.ours,
        "big": out_of_memory,
        "none": refusing,
        "misshapen": misshapen,
    }
    row = small(against, direction).measure(seconds=0.01)
    schema.check(schema.finite(row), schema.Row)
    assert row["right"]
    assert row["peers"]["ours"]["median_us"] > 0
    assert row["peers"]["ours"]["tflops"] > 0
    assert row["peers"]["big"] == {"refused": "OutOfMemoryError: tried to allocate 1 TiB"}
    assert row["peers"]["none"] == {"refused": "not on a Tuesday"}
    if direction == FORWARD:
        assert "result of shape (1, 1, 1, 8)" in row["peers"]["misshapen"]["refused"]


def test_a_wrong_peer_is_timed_and_shown_as_wrong() -> None:
    row = small({"ours": attention.ours, "wrong": wrong}).measure(seconds=0.01)
    assert row["peers"]["wrong"]["right"] is False
    assert row["peers"]["wrong"]["errors"][0]["max"] == pytest.approx(1e-3, rel=0.1)
    assert row["peers"]["wrong"]["times_ours"]["median"] > 0
    assert row["right"]


@pytest.mark.parametrize("ours", [wrong, out_of_memory])
def test_a_row_is_not_right_when_we_are_not(ours: object) -> None:
    row = small({"ours": ours, "eager": attention.eager}).measure(seconds=0.01)
    assert row["right"] is False
    assert row["peers"]["eager"]["right"]


def test_the_rule_is_that_of_the_tests() -> None:
    """`within` agrees with tests/oracle.py on both sides of the bound."""
    true = torch.randn(64, 64, dtype=torch.float64)
    noise = 1e-4 * torch.randn_like(true)
    eager = (true + noise).float()
    verdicts = []
    for scale in (0.5, 1.4, 1.6, 3.0):
        ours = (true + scale * noise.roll(1, 0)).float()
        within = harness.compare((ours,), (true,), (eager,))[0]["within"]
        verdicts.append(within)
        try:
            oracle.assert_close_to_reference(ours, eager, true)
        except AssertionError:
            assert not within
        else:
            assert within
    assert verdicts == [True, True, False, False]


def test_nan_is_never_right() -> None:
    true = torch.zeros(4, dtype=torch.float64)
    got = torch.full((4,), float("nan"))
    assert not harness.compare((got,), (true,), (got,))[0]["within"]


def test_reason_holds_the_warnings_too() -> None:
    """SDPA says only in warnings why a forced backend refuses."""
    cell = small({"ours": attention.ours, "cudnn": attention.sdpa_cudnn})
    text = cell.measure(seconds=0.01)["peers"]["cudnn"]["refused"]
    assert text.startswith("RuntimeError: ")


# --- subjects -------------------------------------------------------------------------------------


SIZES: dict[Any, dict[str, Any]] = {
    attention: {"batch": [2], "seqlen": [33], "heads": [4], "kv_heads": [4, 2], "head_dim": [16],
                "window": [8], "compile": [False], "dtype": ["float32"]},
    decode: {"batch": [2], "seqlen_q": [1, 3], "seqlen": [33], "heads": [4], "kv_heads": [4, 2],
             "head_dim": [16], "page_size": [0, 8], "capacity": [0, 100], "dtype": ["float32"]},
    layer_norm: {"rows": [5, 16], "hidden": [33, 64], "compile": [False], "dtype": ["float32"]},
    ffn: {"rows": [9], "hidden": [16], "inner": [40], "compile": [False], "dtype": ["float32"]},
    cross_entropy: {"rows": [9], "hidden": [16], "classes": [33], "compile": [False],
                    "dtype": ["float32", "bfloat16"]},
    rotary: {"batch": [2], "seqlen": [5], "heads": [4], "kv_heads": [2], "head_dim": [16],
             "compile": [False], "dtype": ["float32"]},
}  # fmt: skip
CASES = [
    *((attention, {"feature": [name], "direction": [FORWARD, BACKWARD], "causal": [True, False]})
      for name in attention.FEATURES),
    (decode, {}),
    *((layer_norm, {"direction": [direction]}) for direction in DIRECTIONS),
    (ffn, {"activation": list(ffn.ACTIVATIONS), "layout": ["linear", "conv1d"]}),
    (cross_entropy, {"op": list(cross_entropy.AXES["op"].choices), "direction": list(DIRECTIONS)}),
    (rotary, {"norms": [False, True], "direction": list(DIRECTIONS)}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "axes"), CASES)
def test_every_peer_that_takes_a_cell_is_right(module: Any, axes: dict[str, Any]) -> None:
    cells = module.SUBJECT.cells("cpu", "full", SIZES[module] | axes)
    assert cells
    for cell in cells:
        row = cell.measure(seconds=0.0)
        schema.check(schema.finite(row), schema.Row)
        assert row["right"], row
        for name, entry in row["peers"].items():
            assert "refused" in entry or entry.get("right", entry.get("ceiling")), (name, row)
        assert row["peers"][row["bound"]]["share"] == 1.0


@pytest.mark.parametrize("module", SIZES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_are_whole(module: Any, device: str) -> None:
    """Each names every axis and no other; a row is found by its title; the kinds are those told."""
    subject = module.SUBJECT
    for (kind, preset), grids in subject.presets.items():
        assert all(set(grid) == set(subject.axes) for grid in grids)
        for grid in grids:
            for name, axis in subject.axes.items():
                assert all(axis.choices is None or value in axis.choices for value in grid[name])
        if kind == device:
            titles = [cell.title for cell in subject.cells(device, preset)]
            assert titles and len(titles) == len(set(titles))


def test_share_of_the_ceiling_is_of_bytes_not_of_time() -> None:
    """A backward moves more than the copy beside it: at the same speed it takes longer."""
    axes = {"op": ["layer_norm"], "residual": [False], "direction": [BACKWARD]}
    (cell,) = layer_norm.SUBJECT.cells(
        "cpu", "quick", SIZES[layer_norm] | axes | {"rows": [5], "hidden": [33]}
    )
    entries = cell.measure(seconds=0.0)["peers"]
    size = 5 * 33 * 4
    copy, ours = entries["copy"], entries["ours"]
    assert copy["gbps"] == pytest.approx(2 * size / copy["median_us"] / 1e3)
    assert ours["gbps"] == pytest.approx(3 * size / ours["median_us"] / 1e3)
    assert ours["share"] == pytest.approx(ours["gbps"] / copy["gbps"])


def test_flops_and_bytes() -> None:
    whole = 4 * 2 * 2 * 9 * 9 * 8
    assert small({}).flops == whole / 2
    assert small({}, BACKWARD).flops == 2.5 * whole / 2
    assert small({}, BOTH).flops == 3.5 * whole / 2
    assert small({}, feature="window", window=3).flops == pytest.approx(whole * 3 / 9)
    cell: Any = decode.make(
        device="cpu", heads=4, kv_heads=2, dtype="float32", batch=2, seqlen_q=1, seqlen=33,
        head_dim=16, page_size=8,
    )  # fmt: skip
    assert cell.bytes == 2 * 2 * 33 * 2 * 16 * 4


# --- targets --------------------------------------------------------------------------------------


class Promising(AttentionCell):
    """Holds from the given attempt on."""

    rounds = 3

    def holds(self, samples: dict[str, Sample]) -> bool:
        return len(samples["ours"].seconds) >= 3 * self.head_dim


@pytest.mark.parametrize(("attempt", "holds"), [(1, True), (3, True), (5, False)])
def test_a_target_that_is_missed_is_measured_again(attempt: int, holds: bool) -> None:
    given = vars(small({"ours": attention.ours}))
    cell = Promising(**(given | {"head_dim": attempt, "target": "a promise"}))
    row = cell.measure(seconds=60.0)
    assert (row["target"], row["holds"]) == ("a promise", holds)
    assert row["peers"]["ours"]["rounds"] == 3 * min(attempt, harness.ATTEMPTS)


# --- peers that are not installed here ------------------------------------------------------------


def test_an_absent_package_is_a_reason() -> None:
    row = small({"ours": attention.ours, "fa": attention.flash_attn_3}).measure(0.0)
    assert row["peers"]["fa"] == {"refused": "flash-attn 3 is not installed"}


def test_a_package_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(peer.importlib, "import_module", broken)
    with pytest.raises(Refused, match=r"xformers cannot be imported: undefined symbol"):
        attention.xformers(small({}))


@pytest.mark.parametrize("feature", ["none", "window", "softcap", "alibi"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_flash_attn_is_called_as_it_wants(
    feature: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own face of flash-attn 2 stands for it; its dtypes are 16-bit."""
    monkeypatch.setitem(sys.modules, "flash_attn", fastattn.flash_attn)
    against = {"ours": attention.ours, "fa": attention.flash_attn_2}
    cell = small(against, direction, feature=feature, window=4 * (feature == "window"))
    for other in ({"kv_heads": 1}, {"causal": False} if feature != "window" else {}):
        cell = Cell.__new__(AttentionCell)
        cell.__dict__.update(vars(small(against, direction, feature=feature, window=4)) | other)
        cell.__dict__["dtype"] = "bfloat16"
        row = cell.measure(seconds=0.0)
        assert row["peers"]["fa"].get("right"), row


@pytest.mark.parametrize("capacity", [0, 1000])
@pytest.mark.parametrize("page_size", [0, 256])
def test_flash_attn_decodes_as_it_wants(
    page_size: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fastattn.flash_attn)
    cell: Any = decode.make(
        device="cpu", heads=4, kv_heads=2, dtype="bfloat16", batch=2, seqlen_q=3, seqlen=300,
        head_dim=16, page_size=page_size, capacity=capacity,
    )  # fmt: skip
    assert cell.measure(0.0, ["flash-attn 2"])["peers"]["flash-attn 2"]["right"]
