"""The `triton` backend of attention: FlashAttention-2's loops, features as compile-time switches.

One family of kernels: `forward` (prefill, packed sequences, decoding on padded or paged caches; its
parts are `rows` and `fold`) and `merge` after it; `cache` before it; `backward`, `keys`, `queries`
and `bias` for the gradients. They share `scores` (a feature is written there once), `blocks`,
`sequences` and `memory`. `launching` prepares their operands, `documents` the tiles to visit.
"""

from __future__ import annotations

import torch

from fastattn import chips
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.attention.triton.backward import backward
from fastattn.ops.attention.triton.forward import forward
from fastattn.ops.common import launch
from fastattn.ops.common import triton as of_kernels

__all__ = ["backward", "forward", "unsupported"]

MAX_HEAD_DIM = 512
WIDE_FLOAT32 = 131 * 1024  # bytes of shared memory of float32 kernels above a head_dim of 256


def unsupported(problem: AttentionProblem) -> str | None:
    """The reason why these kernels cannot run `problem`, or None."""
    if (reason := of_kernels.unsupported(problem)) is not None:
        return reason
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {max(problem.head_dim, problem.head_dim_v)} is above {MAX_HEAD_DIM}"
    if problem.needs_slope_grad:
        return "the kernels have no gradient for alibi_slopes"
    wide = problem.dtype == torch.float32 and max(problem.head_dim, problem.head_dim_v) > 256
    # A fake tensor can name a GPU that is not there.
    if wide and torch.cuda.is_available():
        shared = chips.shared_memory(launch.architecture(problem.device))
        if shared < WIDE_FLOAT32:
            return "float32 with a head_dim above 256 takes more shared memory than this GPU has"
    return None
