"""Which attention weights dropout keeps: a pure function of a seed and a weight's place.

Weight (b, h, i, j) of a call takes word j % 4 of the Philox 4x32-10 block (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3") with the seed as key and the counter
(i, j // 4, b * heads + h, 0). So forward and backward, and kernels of any tile size, agree without
a stored mask; this file is the definition in PyTorch, `triton/scores.py` has the same in Triton.
"""

from __future__ import annotations

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


def keep(
    seed: torch.Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> torch.Tensor:
    """(batch, heads, seqlen_q, seqlen_k) boolean, False for the weights that are dropped."""
    device = seed.device
    block = torch.arange((seqlen_k + 3) // 4, device=device)
    row = torch.arange(seqlen_q, device=device)[:, None]
    plane = torch.arange(batch * heads, device=device)[:, None, None]
    zero = torch.zeros_like(plane + row + block)
    words = torch.stack(_philox(seed, zero + row, zero + block, zero + plane, zero), -1)
    words = words.flatten(-2)[..., :seqlen_k].reshape(batch, heads, seqlen_q, seqlen_k)
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
