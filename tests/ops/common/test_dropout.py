"""Dropout's random numbers: Philox against published values, and the share that is kept."""

from __future__ import annotations

import pytest
import torch

from fastattn.ops.common import dropout

# Known answers of Philox 4x32-10 from Random123 (kat_vectors): counter, key, result.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """The generator in Python's integers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        low, high = 2**32 - 1, 32
        c = [(b >> high) ^ c[1] ^ k[0], b & low, (a >> high) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert philox(counter, key) == list(expected)
    number = key[0] | key[1] << 32
    seed = torch.tensor([number - 2**64 if number >= 2**63 else number])
    words = dropout._philox(seed, *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_which_word_a_weight_takes() -> None:
    """As the module's docstring says: counter (i, j // 4, b * heads + h, 0), word j % 4."""
    seed = torch.tensor([0x123456789ABCDEF])
    kept = dropout.keep(seed, 0.25, 2, 3, 5, 9)
    assert kept.shape == (2, 3, 5, 9)
    key = 0x89ABCDEF, 0x1234567
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 4, 8), (1, 0, 3, 7), (0, 2, 1, 5)):
        word = philox((i, j // 4, b * 3 + h, 0), key)[j % 4]
        signed = word - 2**32 if word >= 2**31 else word
        assert bool(kept[b, h, i, j]) == (signed >= 2**30 - 2**31)


@pytest.mark.parametrize("p", (1e-3, 0.1, 0.5, 0.9, 0.999))
def test_the_share_that_is_kept(p: float) -> None:
    """Within 5 standard deviations in all, and no row, column, head or word of a block is special."""
    kept = dropout.keep(torch.tensor([20240607]), p, 4, 4, 128, 128).double()

    def holds(share: torch.Tensor, n: int, sigmas: float) -> None:
        assert ((share - (1 - p)).abs() <= sigmas * (p * (1 - p) / n) ** 0.5 + 1e-12).all()

    holds(kept.mean(), kept.numel(), 5)
    holds(kept.mean((0, 1, 2)), kept.numel() // 128, 6)
    holds(kept.mean((0, 1, 3)), kept.numel() // 128, 6)
    holds(kept.mean((2, 3)), kept.numel() // 16, 6)
    # Neighbours are independent: both are kept in (1 - p)^2 of the places.
    for pair in (kept[..., 1:] * kept[..., :-1], kept[:, :, 1:] * kept[:, :, :-1]):
        both = (1 - p) ** 2
        assert abs(pair.mean().item() - both) <= 8 * (both * (1 - both) / pair.numel()) ** 0.5


def test_thresholds() -> None:
    """0 keeps all words; the probability nearest 1 keeps at least one; a half is exact."""
    assert dropout.threshold(0.0) == -(2**31)
    assert dropout.threshold(0.5) == 0
    assert dropout.threshold(1 - 2**-60) == 2**31 - 1
