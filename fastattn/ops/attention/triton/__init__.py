"""The `triton` backend of attention: FlashAttention-2's loops, features as compile-time switches.

One family of kernels: `forward` (prefill, packed sequences, decoding on padded or paged caches) and
`merge` after it, `backward` and `bias` for the gradients. `scores` is what they share: a feature is
written there once. `launching` prepares their operands, `documents` the tiles to visit.
"""

from __future__ import annotations

import torch

from fastattn import backends
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.attention.triton.backward import backward
from fastattn.ops.attention.triton.forward import forward
from fastattn.ops.common import launch

__all__ = ["backward", "forward", "unsupported"]

MAX_HEAD_DIM = 512
SMALL = (86, 87, 89, 120, 121)  # chips with 99 KB of shared memory a block


def unsupported(problem: AttentionProblem) -> str | None:
    """The reason why these kernels cannot run `problem`, or None."""
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype == torch.float64:
        return "the Triton kernels compute in float32; float64 is for torch and reference"
    if problem.dtype == torch.bfloat16 and backends.triton_runs() == "interpreted":
        return "Triton's interpreter computes bfloat16 dots wrong"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {max(problem.head_dim, problem.head_dim_v)} is above {MAX_HEAD_DIM}"
    if problem.needs_slope_grad:
        return "the kernels have no gradient for alibi_slopes"
    wide = problem.dtype == torch.float32 and max(problem.head_dim, problem.head_dim_v) > 256
    # A fake tensor can name a GPU that is not there.
    if wide and torch.cuda.is_available() and launch.architecture(problem.device) in SMALL:
        return "float32 with a head_dim above 256 takes more shared memory than this GPU has"
    return None
