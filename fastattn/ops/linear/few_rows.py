"""The product of a linear layer, fast also for a few rows on a CPU, as in decoding.

With one row the product reads every weight once and does nothing else, so it should take the time
that memory takes. F.linear hands it to MKL's matrix-vector routine, which on AMD processors does
not: 17 GB/s, where the same product written as a *batch* of products, one for each group of output
features, reads 40-55 GB/s (AMD EPYC 9005, 2 cores, torch 2.13, float32, 768 -> 768, 2304, 3072 and
50257, 3072 -> 768). For 2 to 4 rows it is the order of the operands that matters: weight @ x^T is
3 to 4 times as fast as x @ weight^T. Both are plain PyTorch, on the weights as they lie. On an
Intel Xeon (2.1 GHz, 1 and 2 threads, torch 2.13, 2026-11-26) F.linear is the faster one, 2 to 2.5
times for 1 and 2 rows, and for 4 rows there is little in it: there it stays, as on all processors
but AMD's.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common import modes

PLAIN = (Tensor, torch.nn.Parameter)
MAX_ROWS = 4
# Below, the views cost as much as they save.
MIN_WEIGHTS = 1 << 16
# Above, F.linear is the faster one: with one row if there is one thread, with more by their number
# (AMD EPYC, one thread, weights beyond the caches, 2026-11-29: 1536 -> 576 takes 0.6 of F.linear's
# time for 2 rows, 1.6 for 4).
MAX_IN_FEATURES_OF_ONE_THREAD = 3072
MAX_IN_FEATURES = {2: 2048, 3: 1024, 4: 768}


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: its arguments, results and errors, on any tensor that it takes."""
    in_features = weight.shape[-1]
    if (  # the cheap questions first
        weight.numel() < MIN_WEIGHTS
        or torch.is_grad_enabled()
        or modes.recorded()  # first: a comparison with a size would hold the recording to it
        or x.numel() > MAX_ROWS * in_features
        or not _eligible(x, weight)
    ):
        return F.linear(x, weight, bias)
    rows, out_features = x.numel() // in_features, weight.shape[0]
    shape = (*x.shape[:-1], out_features)
    if rows == 1:
        groups = _groups(in_features, out_features, torch.get_num_threads())
        if groups:
            # As a column with the stride of a transposed row: with any other, MKL's batched
            # product takes a path that is ten times slower.
            column = x.contiguous().as_strided((groups, in_features, 1), (0, 1, in_features))
            weight = weight.view(groups, -1, in_features)
            if bias is None:
                return torch.bmm(weight, column).view(shape)
            return torch.baddbmm(bias.view(groups, -1, 1), weight, column).view(shape)
    elif in_features <= MAX_IN_FEATURES[rows]:
        columns = x.reshape(rows, in_features).t()
        if bias is None:
            product = torch.mm(weight, columns)
        else:
            product = torch.addmm(bias.unsqueeze(1), weight, columns)
        return product.t().contiguous().view(shape)
    return F.linear(x, weight, bias)


def _eligible(x: Tensor, weight: Tensor) -> bool:
    """Whether the measurement above is about this product, and nobody else has a say in it."""
    return (
        x.is_cpu
        and x.dtype is weight.dtype is torch.float32
        and weight.layout is torch.strided
        and weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]  # else F.linear says what is wrong
        and x.numel() > 0
        and weight.is_contiguous()
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and mkl_is_slow()
    )


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is a processor on which MKL's matrix-vector routine was measured to be slow."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@functools.cache
def _groups(in_features: int, out_features: int, threads: int) -> int:
    """Into how many equal groups to split the output features; 0 for F.linear.

    At least 8, and as many as there are threads, so that all are busy to the end.
    """
    if threads == 1 and in_features > MAX_IN_FEATURES_OF_ONE_THREAD:
        return 0
    fewest = max(8, threads)
    divisors = [g for g in range(fewest, 16 * fewest) if out_features % g == 0]
    # First the evenest load of the threads, then the fewest groups.
    return min(divisors, key=lambda g: (-(-g // threads) * threads / g, g), default=0)
