"""Which elements dropout keeps: a pure function of a seed and an element's place.

Element (i, j) of plane n takes word j % 4 of the Philox 4x32-10 block (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3") with the seed as key and the counter
(i, j // 4, n, 0), each modulo 2^32. So forward and backward, and kernels of any tile size, agree
without a stored mask; this file is the definition in PyTorch, `triton/dropout.py` has the same in
Triton. Attention's planes are the heads of the batch, n = b * heads + h; the norms have one plane,
of all rows.
"""

from __future__ import annotations

import math

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator of `device`, (1,) int64, on it.

    It stays a tensor so that nothing waits for the device, and so that a captured CUDA graph draws
    a new one in every replay.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """A word is dropped if it lies, read as int32, below this: a share `dropout_p` of them."""
    return min(round(dropout_p * 2**32), _WORD) - 2**31


def keep(seed: torch.Tensor, dropout_p: float, *shape: int) -> torch.Tensor:
    """Boolean, False for the elements that are dropped.

    Args:
        seed: (1,) int64.
        dropout_p: the share that is dropped, in [0, 1).
        shape: of the result, (..., rows, columns); the dimensions before are planes.
    """
    *planes, rows, columns = shape
    device = seed.device
    block = torch.arange((columns + 3) // 4, device=device)
    row = torch.arange(rows, device=device)[:, None]
    plane = torch.arange(math.prod(planes), device=device)[:, None, None]
    zero = torch.zeros_like(plane + row + block)
    words = torch.stack(_philox(seed, zero + row, zero + block, zero + plane, zero), -1)
    words = words.flatten(-2)[..., :columns].reshape(shape)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed >= threshold(dropout_p)


def _philox(seed: torch.Tensor, *counter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words, in int64, for each counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # modulo 2^64
        c0 = ((second >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((first >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
