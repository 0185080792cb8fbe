"""The product of a linear layer, fast also for a few rows on a CPU, as in decoding.

With one row the product reads every weight once and does nothing else, so it should take the time
that memory takes. F.linear hands it to MKL's matrix-vector routine, which on AMD processors does
not: 17 GB/s, where the same product written as a *batch* of products, one for each group of output
features, reads 40-55 GB/s (AMD EPYC 9005, 2 cores, torch 2.13, float32, 768 -> 768, 2304, 3072 and
50257, 3072 -> 768). For 2 to 4 rows it is the order of the operands that matters: weight @ x^T is
3 to 4 times as fast as x @ weight^T. Both are plain PyTorch, on the weights as they lie. On an
Intel Xeon (2.1 GHz, 1 and 2 threads, torch 2.13, 2026-11-26) F.linear is the faster one, 2 to 2.5
times for 1 and 2 rows.

For 8 to 15 rows, as when several sequences are decoded at once, MKL is slow on that Xeon: 12 rows
take longer than 16. There weight @ x^T takes 0.45 to 0.99 of F.linear's time from 786,432 weights
on (AVX-512, 1 thread, torch 2.13, weights beyond the caches, 2026-11-29; 576 -> 49152: 0.76 for 8
rows, 0.55 for 12). oneDNN takes less still, but makes six times the errors of F.linear, more than
the numeric rule allows.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common import modes

PLAIN = (Tensor, torch.nn.Parameter)
MAX_ROWS = 15
# Below, the views cost as much as they save.
MIN_WEIGHTS = 1 << 16
# Above, F.linear is the faster one: with one row if there is one thread, with more by their number
# (AMD EPYC, one thread, weights beyond the caches, 2026-11-29: 1536 -> 576 takes 0.6 of F.linear's
# time for 2 rows, 1.6 for 4).
MAX_IN_FEATURES_OF_ONE_THREAD = 3072
MAX_IN_FEATURES = {2: 2048, 3: 1024, 4: 768}
# Of an Intel processor, to MAX_ROWS.
INTEL_MIN_ROWS = 8
INTEL_MIN_WEIGHTS = 3 << 18


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: its arguments, results and errors, on any tensor that it takes."""
    if type(weight) not in PLAIN:  # first: each question is a call of a tensor subclass
        return F.linear(x, weight, bias)
    in_features = weight.shape[-1]
    if (  # the cheap questions first
        weight.numel() < MIN_WEIGHTS
        or torch.is_grad_enabled()
        or modes.recorded()  # first: a comparison with a size would hold the recording to it
        or x.numel() > MAX_ROWS * in_features
        or not _eligible(x, weight)
    ):
        return F.linear(x, weight, bias)
    rows = x.numel() // in_features
    if rows == 1:
        out = _row_by_groups(x, weight, bias) if mkl_is_slow() else None
    elif mkl_is_slow():
        out = _columns(x, weight, bias) if in_features <= MAX_IN_FEATURES.get(rows, 0) else None
    else:
        several = rows >= INTEL_MIN_ROWS and weight.numel() >= INTEL_MIN_WEIGHTS
        out = _columns(x, weight, bias) if several and is_intel() else None
    return F.linear(x, weight, bias) if out is None else out


def _row_by_groups(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The product of one row as a batch of products; None where F.linear is faster."""
    out_features, in_features = weight.shape
    groups = _groups(in_features, out_features, torch.get_num_threads())
    if not groups:
        return None
    # As a column with the stride of a transposed row: with any other, MKL's batched product takes
    # a path that is ten times slower.
    column = x.contiguous().as_strided((groups, in_features, 1), (0, 1, in_features))
    weight = weight.view(groups, -1, in_features)
    if bias is None:
        product = torch.bmm(weight, column)
    else:
        product = torch.baddbmm(bias.view(groups, -1, 1), weight, column)
    return product.view(*x.shape[:-1], out_features)


def _columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product as weight @ x^T."""
    columns = x.reshape(-1, x.shape[-1]).t()
    if bias is None:
        product = torch.mm(weight, columns)
    else:
        product = torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.t().contiguous().view(*x.shape[:-1], len(weight))


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
    )


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is a processor on which MKL's matrix-vector routine was measured to be slow."""
    return torch.backends.mkl.is_available() and _made_by("AuthenticAMD")


@functools.cache
def is_intel() -> bool:
    """Whether this is a processor like the one on which several rows were measured to be slow."""
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return avx512 and torch.backends.mkl.is_available() and _made_by("GenuineIntel")


def _made_by(vendor: str) -> bool:
    try:
        return vendor in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
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
