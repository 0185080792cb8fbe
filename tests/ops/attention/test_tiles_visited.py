"""The kernels compute the tiles of scores that the mask leaves, each once, and no other.

`score_tile` is counted, by the positions it is asked for: in Triton's interpreter a kernel finds it
where Python would. What should be counted follows from the definition of the mask, element by
element. (Documents leave a range of keys for each tile of queries; cut by a window or by lengths it
may keep a tile at its ends in which nothing is seen. That is not tested for.)
"""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fastattn import BlockMask
from fastattn.backends import triton_runs
from fastattn.ops.attention import tiles
from fastattn.ops.attention import triton as kernels
from fastattn.ops.attention.call import NO_GRADIENT
from fastattn.ops.attention.problem import check, check_varlen
from fastattn.ops.attention.tiles import Tile

pytestmark = pytest.mark.skipif(
    triton_runs() != "interpreted", reason="calls inside a kernel are counted in the interpreter"
)

Tiles = Counter[tuple[int, int]]  # (first query, first key) -> how often
Rule = Callable[[int, torch.Tensor, torch.Tensor, int], torch.Tensor | bool]

HEADS, KV_HEADS = 2, 1
# Wider than high, higher than wide, and the lengths of no case are multiples of them.
SHAPES = (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))


@dataclass(frozen=True)
class Case:
    """A mask; `sees(b, i, j, d)` says it again, d being the bottom-right diagonal."""

    sees: Rule
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] = ((60, 60), (41, 75), (75, 41))
    batch: int = 1

    def expected(self, b: int, seqlen_q: int, seqlen_k: int, tile: Tile) -> Tiles:
        i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)
        seen = torch.as_tensor(self.sees(b, i, j, seqlen_k - seqlen_q))
        seen = seen.expand(seqlen_q, seqlen_k)
        corners = itertools.product(
            range(0, seqlen_q, tile.block_m), range(0, seqlen_k, tile.block_n)
        )
        return Counter(
            (m, n) for m, n in corners if seen[m : m + tile.block_m, n : n + tile.block_n].any()
        )


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


LENGTHS = integers(37, 0)
WINDOWS = {
    "both sides": (20, 10),
    "left": (20, -1),
    "right": (-1, 10),
    "the diagonal": (0, 0),
}
DOCUMENTS = integers(*[0] * 20, *[1] * 3, *[5] * 25, *[6] * 12)[None]
KEPT = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
BLOCK = 32

CASES: dict[str, Case] = {
    "no mask": Case(lambda b, i, j, d: True),
    "causal": Case(lambda b, i, j, d: j <= i + d, {"causal": True}),
    "top left": Case(lambda b, i, j, d: j <= i, {"causal": "top_left"}),
    **{
        f"window: {name}": Case(
            lambda b, i, j, d, left=left, right=right: (
                ((left < 0) | (j >= i + d - left)) & ((right < 0) | (j <= i + d + right))
            ),
            {"window": (left, right)},
        )
        for name, (left, right) in WINDOWS.items()
    },
    "causal window": Case(
        lambda b, i, j, d: (j <= i + d) & (j >= i + d - 20), {"causal": True, "window": (20, 7)}
    ),
    "top left window": Case(
        lambda b, i, j, d: (j <= i) & (j >= i - 20), {"causal": "top_left", "window": (20, 0)}
    ),
    "key_lengths": Case(lambda b, i, j, d: j < LENGTHS[b], {"key_lengths": LENGTHS}, batch=2),
    "causal, key_lengths": Case(
        lambda b, i, j, d: (j <= i + d) & (j < LENGTHS[b]),
        {"causal": True, "key_lengths": LENGTHS},
        batch=2,
    ),
    "window, key_lengths": Case(
        lambda b, i, j, d: (j <= i + d + 10) & (j >= i + d - 20) & (j < LENGTHS[b]),
        {"window": (20, 10), "key_lengths": LENGTHS},
        batch=2,
    ),
    "documents": Case(
        lambda b, i, j, d: DOCUMENTS[b][i] == DOCUMENTS[b][j],
        {"document_ids": DOCUMENTS},
        ((60, 60),),
    ),
    "causal documents": Case(
        lambda b, i, j, d: (DOCUMENTS[b][i] == DOCUMENTS[b][j]) & (j <= i),
        {"document_ids": DOCUMENTS, "causal": True},
        ((60, 60),),
    ),
    "block mask": Case(
        lambda b, i, j, d: KEPT[i // BLOCK, j // BLOCK],
        {
            "block_mask": BlockMask.from_predicate(
                lambda b, h, i, j: KEPT[i // BLOCK, j // BLOCK], 1, 1, 96, 96, block_size=BLOCK
            )
        },
        ((96, 96),),
    ),
}


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tiles]:
    """Tiles that are computed from now on, of the forward, the dK and dV, and the dQ kernel."""
    counts: dict[str, Tiles] = {name: Counter() for name in ("forward", "keys", "queries")}
    for name in counts:
        file = "fold" if name == "forward" else name
        module = importlib.import_module(f"fastattn.ops.attention.triton.{file}")
        score_tile = module.score_tile

        def counting(
            products: Any, i: Any, j: Any, *args: Any, _f: Any = score_tile, _n: str = name
        ) -> Any:
            queries, keys = i.handle.data, j.handle.data
            counts[_n][int(queries.min()), int(keys.min())] += 1
            return _f(products, i, j, *args)

        monkeypatch.setattr(module, "score_tile", counting)
    return counts


def run(q: torch.Tensor, k: torch.Tensor, extras: Any, settings: Any, tile: Tile) -> None:
    with (
        tiles.overridden(tiles.FORWARD, tile),
        tiles.overridden(tiles.KEYS, tile),
        tiles.overridden(tiles.QUERIES, tile),
    ):
        out, lse = kernels.forward(q, k, k, extras, settings)
        kernels.backward(out, lse, out, lse, NO_GRADIENT, q, k, k, extras, settings)


def multiplied(counts: Tiles, by: int) -> Tiles:
    return Counter({place: n * by for place, n in counts.items()})


@pytest.mark.parametrize("tile", SHAPES, ids=lambda t: f"{t.block_m} x {t.block_n}")
@pytest.mark.parametrize("name", CASES)
def test_padded(name: str, tile: Tile, visited: dict[str, Tiles]) -> None:
    case, batch = CASES[name], CASES[name].batch
    for seqlen_q, seqlen_k in case.lengths:
        q = torch.randn(batch, seqlen_q, HEADS, 16)
        k = torch.randn(batch, seqlen_k, KV_HEADS, 16)
        settings, extras = check(q, k, k, **case.options)
        run(q, k, extras, settings, tile)
        of_a_head = [case.expected(b, seqlen_q, seqlen_k, tile) for b in range(batch)]
        expected = multiplied(sum(of_a_head, Counter()), HEADS)
        for kernel, counts in visited.items():
            assert counts == expected, f"{kernel}, {seqlen_q} x {seqlen_k}"
            counts.clear()


PACKED = ((60, 60), (0, 0), (41, 75), (75, 41), (1, 17))


# Of any lengths, and not by key_lengths: packed sequences have seqused_k.
PACKABLE = [
    name for name, x in CASES.items() if len(x.lengths) > 1 and "key_lengths" not in x.options
]


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("used", [False, True], ids=["", "seqused"])
def test_packed(name: str, used: bool, visited: dict[str, Tiles]) -> None:
    case, tile = CASES[name], SHAPES[used]
    starts = [
        list(itertools.accumulate((pair[side] for pair in PACKED), initial=0)) for side in (0, 1)
    ]
    q = torch.randn(starts[0][-1], HEADS, 16)
    k = torch.randn(starts[1][-1], KV_HEADS, 16)
    lengths: Sequence[tuple[int, int]] = PACKED
    seqused: dict[str, Any] = {}
    if used:
        lengths = [(n // 2 + 1 if n else 0, m // 3) for n, m in PACKED]
        seqused = {
            "seqused_q": integers(*(n for n, _ in lengths)),
            "seqused_k": integers(*(m for _, m in lengths)),
        }
    settings, extras = check_varlen(
        q, k, k, *(integers(*x) for x in starts), 75, 75, **seqused, **case.options
    )
    run(q, k, extras, settings, tile)
    of_a_head = [case.expected(b, *pair, tile) for b, pair in enumerate(lengths)]
    expected = multiplied(sum(of_a_head, Counter()), HEADS)
    for kernel, counts in visited.items():
        assert counts == expected, kernel


DECODES = {
    "causal": Case(lambda b, i, j, d: j <= i + d, {"causal": True}),
    "key_lengths": Case(lambda b, i, j, d: j < 15 * LENGTHS[b], {"key_lengths": 15 * LENGTHS}),
    "window": Case(
        lambda b, i, j, d: (j <= i + d) & (j >= i + d - 300), {"causal": True, "window": (300, 0)}
    ),
}


@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_decode(name: str, seqlen_q: int, visited: dict[str, Tiles]) -> None:
    """The heads that share a key head are one tile's rows; parts of the keys overlap in no tile."""
    case, tile, seqlen_k = DECODES[name], Tile(16, 32, 4, 1), 700
    q, k = torch.randn(2, seqlen_q, 4, 16), torch.randn(2, seqlen_k, 2, 16)
    settings, extras = check(q, k, k, **case.options)
    with tiles.overridden(tiles.DECODE, tile):
        kernels.forward(q, k, k, extras, settings)
    of_a_head = [case.expected(b, seqlen_q, seqlen_k, tile) for b in range(2)]
    assert visited["forward"] == multiplied(sum(of_a_head, Counter()), 2)


def test_a_causal_mask_saves_what_it_should(visited: dict[str, Tiles]) -> None:
    """Of n x n square tiles the mask leaves n (n + 1) / 2, a window of one tile 2 n - 1."""
    tile, n = Tile(16, 16, 4, 1), 6
    q = torch.randn(1, 16 * n, 1, 16)
    for options, count in (
        ({}, n * n),
        ({"causal": True}, n * (n + 1) // 2),
        ({"causal": True, "window": (16, 0)}, 2 * n - 1),
    ):
        settings, extras = check(q, q, q, **options)
        run(q, q, extras, settings, tile)
        assert {name: x.total() for name, x in visited.items()} == dict.fromkeys(visited, count)
        for counts in visited.values():
            counts.clear()
