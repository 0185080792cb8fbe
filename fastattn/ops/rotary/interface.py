"""The public function `rotary`: describe the call, choose a backend, run it."""

from __future__ import annotations

import torch

from fastattn import backends, proving
from fastattn.ops.common.dispatch import Dispatch
from fastattn.ops.rotary import problem as _problem
from fastattn.ops.rotary import proof as _proof
from fastattn.ops.rotary import registration

BACKENDS = registration.BACKENDS

_dispatch: Dispatch[_problem.RotaryProblem] = Dispatch(BACKENDS, registration.run_kernel)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of q and k in one call, after the RMSNorm of their heads if wanted.

        x' = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)       where a weight is given
        first = x'_a * cos - x'_b * sin
        second = x'_b * cos + x'_a * sin

    for each pair (a, b) of the first `rotary_dim` elements of a head (Su et al. 2021,
    arXiv:2104.09864; Zhang and Sennrich 2019, arXiv:1910.07467). The other elements pass. Without
    weights this is transformers' `apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)`; q and k
    that lie as (batch, heads, seqlen, head_dim) are given as `q.transpose(1, 2)`, which copies
    nothing.

    The kernels and the reference compute in float32 (float64 for float64 inputs) and round once.
    The `torch` backend computes in the promoted dtype of its inputs, with a rounding less than the
    formula written out. Autocast changes nothing. The gradients of the weights have no atomics: the
    same inputs give the same bits on the same GPU.

    Args:
        q: (batch, seqlen, heads, head_dim); float16, bfloat16, float32 or float64. Any strides.
        k: (batch, seqlen, kv_heads, head_dim), in q's dtype. Any strides, any number of heads.
        cos, sin: of any of these dtypes, both of one shape: a table (positions, width), or the
            angles of every token (batch or 1, seqlen, width). The width is rotary_dim / 2, with one
            angle for each pair; or rotary_dim, with one for each element, as the
            `position_embeddings` of transformers have it. Gradients for them come from `torch` and
            `reference`.
        positions: (batch or 1, seqlen) or (seqlen,), int32 or int64: the rows of the table. Not
            given: 0, 1, ... Positions outside of the table raise on a CPU, and are cut to it on a
            GPU, where looking at them would wait for the device (FASTATTN_CHECK=1 looks).
        rotary_dim: how many elements of a head are rotated; even. Default: all of them where the
            width is head_dim or head_dim / 2, and the width where that is more than head_dim / 2.
            Narrower cos and sin could mean either, so that it must be given.
        interleaved: the pairs are (2c, 2c + 1), as in GPT-J; else (c, c + rotary_dim / 2), as in
            Llama.
        q_weight, k_weight: (head_dim,), of any of these dtypes; None for no norm of q, or of k.
        eps: added to the mean square; finite, not negative.
        weight_offset: added to the weights; 1 for Gemma's norm.
        backend: "triton", "torch" or "reference"; default: the first capable one.

    Returns:
        q and k rotated: new tensors, in the dtypes and shapes of q and k.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        fastattn.UnsupportedError: the backend that the user named cannot run the call.
    """
    tensors = q, k, cos, sin, positions, q_weight, k_weight
    settings = rotary_dim, interleaved, eps, weight_offset
    key, plan = _dispatch.find(tensors, *settings, backend)
    if plan is None:
        described = _problem.describe(
            q, k, cos, sin, positions=positions, rotary_dim=rotary_dim, interleaved=interleaved,
            q_weight=q_weight, k_weight=k_weight, eps=eps, weight_offset=weight_offset,
        )  # fmt: skip
        plan = _dispatch.make(key, described, backend)
    elif positions is not None:
        _problem.check_values(positions, cos.shape[0])
    described, run = plan
    q, k = run(described, *tensors)
    return q, k


backends.register(rotary, _problem.describe, BACKENDS)
proving.register("rotary", _proof.PROOF)
