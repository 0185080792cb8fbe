"""A cell of a benchmark: every peer is checked before it is timed, and none can spoil the row."""

from __future__ import annotations

import ffn
import harness
import layer_norm
import peers
import pytest
import torch
from attention import AttentionCell
from peers import Peer, Refused

import oracle


def small(against: dict, backward: bool = False) -> AttentionCell:
    return AttentionCell(
        op="attention",
        device="cpu",
        dtype="float32",
        backward=backward,
        against=against,
        batch=2,
        seqlen=9,
        heads=2,
        head_dim=8,
        causal=True,
    )


def out_of_memory(cell: AttentionCell) -> Peer:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    return Peer(attention)


def refusing(cell: AttentionCell) -> Peer:
    raise Refused("not on a Tuesday")


def wrong(cell: AttentionCell) -> Peer:
    return Peer(lambda q, k, v: peers.attention_formula(q, k, v, cell.causal) + 1e-3)


def misshapen(cell: AttentionCell) -> Peer:
    return Peer(lambda q, k, v: peers.attention_formula(q, k, v, cell.causal)[:, :1])


@pytest.mark.parametrize("backward", [False, True])
def test_peers_that_fail_stay_in_their_own_entry(backward: bool) -> None:
    against = {
        "ours": peers.attention_ours,
        "big": out_of_memory,
        "none": refusing,
        "misshapen": misshapen,
    }
    row = small(against, backward).measure(seconds=0.01)
    assert row["right"]
    assert row["peers"]["ours"]["median_us"] > 0
    assert row["peers"]["ours"]["tflops"] > 0
    assert row["peers"]["big"] == {"refused": "OutOfMemoryError: tried to allocate 1 TiB"}
    assert row["peers"]["none"] == {"refused": "not on a Tuesday"}
    if not backward:
        assert "result of shape (1, 1, 1, 8)" in row["peers"]["misshapen"]["refused"]


def test_a_wrong_peer_is_timed_and_shown_as_wrong() -> None:
    row = small({"ours": peers.attention_ours, "wrong": wrong}).measure(seconds=0.01)
    assert row["peers"]["wrong"]["right"] is False
    assert row["peers"]["wrong"]["errors"][0]["max"] == pytest.approx(1e-3, rel=0.1)
    assert row["peers"]["wrong"]["times_ours"]["median"] > 0
    assert row["right"]


@pytest.mark.parametrize("ours", [wrong, out_of_memory])
def test_a_row_is_not_right_when_we_are_not(ours: object) -> None:
    row = small({"ours": ours, "eager": peers.attention_eager}).measure(seconds=0.01)
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
    cell = small({"ours": peers.attention_ours, "cudnn": peers.attention_sdpa_cudnn})
    text = cell.measure(seconds=0.01)["peers"]["cudnn"]["refused"]
    assert text.startswith("RuntimeError: ")


@pytest.mark.parametrize("module", [layer_norm, ffn])
def test_every_cell_of_the_rehearsal_is_right(module: object) -> None:
    for cell in module.cells("cpu"):
        row = cell.measure(seconds=0.0)
        assert row["right"], row
        assert all("median_us" in entry for entry in row["peers"].values()), row


def test_gpu_cells_fit_the_tables() -> None:
    """Titles are unique (a row is found by its title), and the grid has what it should."""
    import attention

    for module in (attention, layer_norm, ffn):
        cells = list(module.cells("cuda"))
        assert len({cell.title for cell in cells}) == len(cells)
    cells = list(attention.cells("cuda"))
    assert {cell.head_dim for cell in cells} == {64, 128, 256}
    assert {cell.seqlen for cell in cells} == {512, 2048, 4096, 16384}
    assert all(cell.batch * cell.seqlen == attention.TOKENS for cell in cells)
    assert (cells[0].head_dim, cells[0].seqlen) == (128, 4096)


def test_share_of_the_ceiling_is_of_bytes_not_of_time() -> None:
    """A backward moves more than the copy beside it: at the same speed it takes longer."""
    cell = next(cell for cell in layer_norm.cells("cpu") if cell.backward and not cell.residual)
    entries = cell.measure(seconds=0.0)["peers"]
    size = cell.rows * cell.hidden * 4
    copy, ours = entries["copy"], entries["ours"]
    assert copy["gbps"] == pytest.approx(2 * size / copy["median_us"] / 1e3)
    assert ours["gbps"] == pytest.approx(3 * size / ours["median_us"] / 1e3)
    assert ours["share_of_copy"] == pytest.approx(ours["gbps"] / copy["gbps"])
    assert copy["share_of_copy"] == 1.0


def test_flops_and_bytes() -> None:
    cell = small({})
    assert cell.flops == 4 * 2 * 2 * 9 * 9 * 8 / 2
    norm = next(layer_norm.cells("cpu"))
    assert norm.bytes == 2 * 5 * 33 * 4
