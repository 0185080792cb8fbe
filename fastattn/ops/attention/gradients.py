"""The gradients of attention on some of the keys, by the out and LSE over all of them.

With P = exp(S - LSE), the weights over all keys, those of each key depend on no other key:

    dV = P^T dO,   dS = P (dO V^T - delta),   delta = rowsum(dO O) - dLSE
    dQ = scale dS K, summed over the parts,   dK = scale dS^T Q

(Dao 2023, arXiv:2307.08691, algorithm 2). The kernels' backward takes any out and LSE; beside the
backends that are plain PyTorch, this is their formula, by chunks of queries.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn import backends
from fastattn.ops.attention import problem as _problem
from fastattn.ops.attention.call import Extras
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.attention.reference import visible
from fastattn.ops.attention.registration import BACKENDS
from fastattn.ops.common import modes

CHUNK = 512  # queries, whose scores are there at one time

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gradients(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backend: str | None,
    **features: Any,
) -> Gradients:
    """(dq, dk, dv) of `attention(q, k, v, **features)` as a part of attention over more keys.

    Args:
        dout, dlse: of the result over all keys, in the shapes and dtypes of out and lse.
        out, lse: this result.
        features: those of `attention` without a gradient of their own, and without dropout.

    Returns:
        In the inputs' dtype, or wider: where a formula computes them.
    """
    settings, extras = _problem.check(q, k, v, **features)
    problem = AttentionProblem.of(q, k, v, extras, settings, return_lse=True)
    chosen = backends.select("attention", BACKENDS, problem, backend).name
    if chosen not in backends.KERNELS:
        return _formula(problem, dout, dlse, out, lse, q, k, v, extras)
    forced = backends.choice(BACKENDS, backend) is not None
    dq, dk, dv, _, _ = torch.ops.fastattn.attention_backward(
        dout, dlse, out, lse, [False, False], q, k, v, *extras, *settings, chosen, forced
    )
    return dq, dk, dv


def _formula(
    problem: AttentionProblem,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
) -> Gradients:
    precision = modes.at_least_float32(q.dtype)
    q, k, v, out, dout = (x.transpose(1, 2).to(precision) for x in (q, k, v, out, dout))
    group, cap = problem.group_size, problem.settings.softcap
    if group != 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, H, Sk, D)
    delta = (dout * out).sum(-1) - (0.0 if dlse is None else dlse)  # (B, H, Sq)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, problem.seqlen_q, CHUNK):
        rows = slice(start, min(start + CHUNK, problem.seqlen_q))
        mine, its_dout = q[:, :, rows], dout[:, :, rows]
        scores = problem.settings.softmax_scale * (mine @ k.transpose(-2, -1))
        if cap:
            bent = torch.tanh(scores / cap)
            scores = cap * bent
        p = torch.exp(scores - lse[:, :, rows, None])
        seen = visible(problem, extras, q.device, rows)
        if seen is not None:
            p = p.masked_fill(~seen, 0.0)
        ds = p * (its_dout @ v.transpose(-2, -1) - delta[:, :, rows, None])
        if cap:
            ds = ds * (1.0 - bent * bent)
        ds = problem.settings.softmax_scale * ds
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(-2, -1) @ mine
        dv += p.transpose(-2, -1) @ its_dout
    if group != 1:
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
