"""Which keys the blocks of two parts show to which queries: exactly those of the definition."""

from __future__ import annotations

import pytest
import torch

from fastattn.ops.attention import zigzag

WINDOWS = [None, (-1, -1), (0, 0), (1, 2), (3, -1), (-1, 4), (5, 0), (7, 7), (40, 1), (2, 40)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_places_are_a_permutation(size: int) -> None:
    length = 2 * size * 5
    held = torch.cat([zigzag.places(rank, size, length) for rank in range(size)])
    assert held.sort().values.tolist() == list(range(length))


def _shown(block: zigzag.Block, part: int) -> torch.Tensor:
    """The scores of two parts that a call of attention computes for `block`."""
    left, right = block.window or (-1, -1)
    rows, columns = (torch.arange(part)[x] for x in (block.rows, block.columns))
    i, j = torch.arange(len(rows))[:, None], torch.arange(len(columns))
    diagonal = i + len(columns) - len(rows)  # attention's own, bottom-right
    seen = torch.ones(len(rows), len(columns), dtype=torch.bool)
    if block.causal:
        right = 0
    if left >= 0:
        seen &= j >= diagonal - left
    if right >= 0:
        seen &= j <= diagonal + right
    whole = torch.zeros(part, part, dtype=torch.int)
    whole[rows[:, None], columns] += seen.int()
    return whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("size", "piece"), [(1, 3), (2, 1), (2, 4), (3, 5), (4, 3)])
def test_blocks_are_the_mask(
    size: int, piece: int, window: tuple[int, int] | None, causal: bool
) -> None:
    left, right = window or (-1, -1)
    length, part = 2 * size * piece, 2 * piece
    for rank in range(size):
        i = zigzag.places(rank, size, length)[:, None]
        for source in range(size):
            j = zigzag.places(source, size, length)
            expected = torch.ones(part, part, dtype=torch.bool)
            if left >= 0:
                expected &= j >= i - left
            if causal or right >= 0:
                expected &= j <= i + (0 if causal else right)
            blocks = zigzag.blocks(rank, source, size, piece, causal, window)
            shown = sum((_shown(block, part) for block in blocks), torch.zeros(part, part).int())
            assert torch.equal(shown, expected.int()), (rank, source, blocks)
            assert all(_shown(block, part).any() for block in blocks)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_causal_work_is_equal(size: int) -> None:
    piece = 6
    work = [
        sum(
            int(_shown(block, 2 * piece).sum())
            for source in range(size)
            for block in zigzag.blocks(rank, source, size, piece, True, None)
        )
        for rank in range(size)
    ]
    assert len(set(work)) == 1
    whole = 2 * size * piece
    assert sum(work) == whole * (whole + 1) // 2
