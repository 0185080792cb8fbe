"""The table of main loops: the reading and the model that it is made with, and that it is of these tiles."""

from __future__ import annotations

import json

import pytest
from compile import model, sass, table
from compile.test_sass import listing

from fastattn.ops.attention import tiles
from fastattn.ops.common import tiles as product_tiles
from fastattn.ops.linear_cross_entropy import tiles as loss_tiles

A100, H100 = model.CHIPS[80], model.CHIPS[90]


def test_the_document_has_the_tiles_of_the_tables() -> None:
    found = table.tiles_written()
    assert len(found) >= 2 * (3 * 6 + 2 + 2)
    fix = "if it is meant: python tests/compile/table.py --write"
    for (architecture, name), written in found.items():
        kernel, _, width = name.removesuffix(", causal").partition(" d ")
        if kernel.startswith(("ffn", "linear_cross_entropy")):
            loss = loss_tiles.tile(2, aligned=True)
            ours = product_tiles.LARGER[architecture] if kernel.startswith("ffn") else loss
            sides = (ours.block_m, ours.block_n, ours.block_k)
            expected = table.tile(sides, ours.warps, ours.stages)
        else:
            row = tiles.tile(kernel, architecture, 2, int(width), tiles.PLAIN)
            expected = table.tile((row.block_m, row.block_n), row.warps, row.stages)
        assert written == expected, f"sm_{architecture} {name}; {fix}"


def test_the_document_has_the_peers() -> None:
    for peer in json.loads(table.PEERS.read_text())["peers"]:
        assert f"| *{peer['name']}* | {peer['tile']} |" in table.written()


@pytest.mark.parametrize(
    ("chip", "registers", "threads", "shared", "expected"),
    [
        (A100, 255, 128, 32768, 2),
        (A100, 128, 256, 0, 2),
        (A100, 129, 256, 0, 1),
        (A100, 32, 128, 80 * 1024, 2),
        (A100, 32, 128, 82 * 1024, 1),
        (H100, 32, 128, 82 * 1024, 2),
        (H100, 255, 256, 230 * 1024, 0),
        (H100, 32, 1024, 0, 2),
        (H100, 16, 32, 0, 32),
    ],
)
def test_blocks_that_a_multiprocessor_holds(
    chip: model.Chip, registers: int, threads: int, shared: int, expected: int
) -> None:
    assert model.blocks_per_sm(chip, registers, threads, shared) == expected


PRODUCTS = ["HMMA.16816.F32.BF16 R8, R4, R6, R8"] * 8


def test_the_bound_is_the_busiest_unit() -> None:
    """8 products take 64 clocks of an A100's tensor cores, 16 exponentials 128 of their unit."""
    alone = model.bound(sass.instructions(listing(*PRODUCTS)), A100)
    assert (alone.ideal, alone.share, alone.longest) == (64, 1.0, "tensor cores")
    both = model.bound(sass.instructions(listing(*PRODUCTS, *["MUFU.EX2 R1, R2"] * 16)), A100)
    assert (both.share, both.longest) == (0.5, "exponentials")
    assert both.others_per_clock == 16 / 64


def test_the_simulation_keeps_to_the_bound_and_sees_waits() -> None:
    """Copies that are awaited right after their issue cost their latency, and two blocks hide it."""
    trip = [*PRODUCTS * 8, "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR"]
    late, early = (
        sass.instructions(listing(*trip, f"DEPBAR.LE SB0, {left}")) for left in ("0x0", "0x1")
    )
    bound = model.bound(late, A100).share
    (waiting,), (ahead,), (together,) = (
        {*model.estimate(code, A100, blocks, 1)}
        for code, blocks in ((late, 1), (early, 1), (late, 2))
    )
    assert waiting < 0.65 * bound
    assert waiting < 0.75 * ahead and ahead <= bound
    assert waiting < 0.75 * together and together <= bound
