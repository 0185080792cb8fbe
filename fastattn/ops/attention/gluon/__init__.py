"""The `gluon` backend of attention: kernels for Hopper in Triton's low-level dialect.

The forward (`forward.py`): float16 and bfloat16, head_dim up to 256 in steps of 8, v's of its own,
causal masks and windows, softcap, ALiBi, a sink, grouped heads, key lengths, packed sequences.

The backward (`backward.py`): all of that up to head_dim 128, with equal bits in every run but with
`deterministic=False`. That of another call is the first other kernel's that can run it.
"""

from __future__ import annotations

from fastattn.ops.attention.gluon.backward import backward
from fastattn.ops.attention.gluon.backward import unsupported as backward_unsupported
from fastattn.ops.attention.gluon.forward import forward
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.attention.tiles import few_queries as declined
from fastattn.ops.common import gluon

__all__ = ["backward", "backward_unsupported", "declined", "forward", "unsupported"]

MAX_HEAD_DIM = 256
MAX_SOFTCAP = 64.0  # e^2x is right to 2^-24, and tanh to half of it, times the cap
MAX_SEQLEN = 2**29  # positions are 32-bit, and so are three of them added
MISSING = {
    "mask": "no masks",
    "bias": "no bias",
    "q_documents": "no documents",
    "blocks": "no block masks",
}


def unsupported(problem: AttentionProblem) -> str | None:
    """The reason why these kernels cannot run `problem`, or None."""
    if (reason := gluon.unavailable(problem.device)) is not None:
        return reason
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need a differentiable backend"
    if problem.dtype.itemsize != 2:
        return f"the Gluon kernels compute in float16 and bfloat16, not in {problem.dtype}"
    if (widest := max(problem.head_dim, problem.head_dim_v)) > MAX_HEAD_DIM:
        return f"head_dim {widest} is above {MAX_HEAD_DIM}"
    if problem.head_dim % 8 or problem.head_dim_v % 8:
        return "TMA copies 16 bytes at least: the Gluon kernels need a head_dim in steps of 8"
    if problem.is_empty:
        return "TMA has no descriptor of an empty tensor"
    for name, what in MISSING.items():
        if name in problem.given:
            return f"the Gluon kernels have {what}"
    if problem.dropout_p:
        return "the Gluon kernels have no dropout"
    if problem.settings.softcap > MAX_SOFTCAP:
        return f"a softcap above {MAX_SOFTCAP} would lose digits in the Gluon kernels' tanh"
    if problem.needs_slope_grad:
        return "the kernels have no gradient for alibi_slopes"
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_SEQLEN:
        return f"a sequence of {max(problem.seqlen_q, problem.seqlen_k)} tokens is above 2^29"
    return problem.misfit
