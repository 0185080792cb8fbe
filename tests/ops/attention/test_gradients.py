"""Gradients of parts of the keys by the out and LSE over all of them: together, attention's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.attention import cases
from ops.backends import BACKENDS, widest

from fastattn.ops.attention.gradients import gradients
from oracle import assert_close_to_reference

CASES: dict[str, dict[str, Any]] = {
    "plain": {"seqlen_q": 21, "seqlen_k": 33},
    "grouped heads, softcap, narrow values": {
        "seqlen_q": 18, "seqlen_k": 30, "heads": 4, "softcap": 1.5, "softmax_scale": 0.9,
        "head_dim_v": 8,
    },
    "documents": {"seqlen_q": 19, "seqlen_k": 40, "documents": "sorted"},
    "several chunks": {"seqlen_q": 1030, "seqlen_k": 9, "batch": 1, "heads": 1, "kv_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_parts_add_up(name: str, backend: str, device: str) -> None:
    if name == "several chunks" and backend in ("triton", "cuda"):
        pytest.skip("a kernel has no chunks")
    case = cases.Case(**CASES[name], dtype=widest(backend), device=device, seed=5)
    if backend == "cuda" and case.documents:
        pytest.skip("the CUDA kernels have no documents")
    if backend == "torch" and (case.softcap or device != "cpu"):
        pytest.skip("ATen has no softcap, and no LSE but on a CPU")
    case = cases.runnable(case, backend)
    problem = case.draw()
    options = {x: problem.options[x] for x in ("softmax_scale", "softcap")}
    documents = problem.options.get("document_ids")
    g = torch.Generator().manual_seed(1)

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        """out, lse, dq, dk, dv of the formula over all keys."""
        leaves = [problem.tensors[x].detach().to(dtype, copy=True) for x in "qkv"]
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = cases.formula(*leaves, **options, document_ids=documents)
        given = [dout.to(dtype), dlse.to(lse.dtype)]
        return [out, lse, *torch.autograd.grad((out, lse), leaves, given)]

    q, k, v = (problem.tensors[x] for x in "qkv")
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=g).to(q)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=g).to(device)
    exact, eager = results(torch.float64), results(q.dtype)
    blind = exact[1] == float("-inf")  # constant there
    dlse = dlse.masked_fill(blind, 0.0)
    out, lse = exact[0].to(q.dtype), exact[1].float()
    middle = k.shape[1] // 3
    parts = []
    for columns in (slice(0, middle), slice(middle, None)):
        features: dict[str, Any] = dict(options)
        if documents is not None:
            features["document_ids"] = documents[0], documents[1][:, columns]
        parts.append(
            gradients(
                dout, dlse, out, lse, q, k[:, columns], v[:, columns], backend=backend, **features
            )
        )
    (dq, dk, dv), (more, *others) = parts
    ours = (dq + more, torch.cat([dk, others[0]], 1), torch.cat([dv, others[1]], 1))
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if case.softcap else {}
    for which, got, theirs, truth in zip(("dq", "dk", "dv"), ours, eager[2:], exact[2:]):
        assert_close_to_reference(
            got.to(q.dtype), theirs, truth, name=which, ulps=cases.units(case, backend)[0],
            terms=1.0, **factors,
        )  # fmt: skip
