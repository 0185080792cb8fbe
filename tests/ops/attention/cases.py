"""Problems of attention for the tests: drawn from a seed, run on any backend, held to the rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

import fastattn
from oracle import assert_close_to_reference


@dataclass
class Case:
    """One problem; `inputs` draws its tensors, `run` computes outputs and gradients."""

    seqlen_q: int
    seqlen_k: int
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    causal: bool = False
    softmax_scale: float | None = None
    mask: tuple[int, int, int] | None = None  # 1 where a dimension of (B, H, Sq) is broadcast
    lengths: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(self.dtype).to(self.device)

        q = normal(self.batch, self.seqlen_q, self.heads, self.head_dim)
        k = normal(self.batch, self.seqlen_k, self.kv_heads, self.head_dim)
        v = normal(self.batch, self.seqlen_k, self.kv_heads, self.head_dim)
        options: dict[str, Any] = {"causal": self.causal, "softmax_scale": self.softmax_scale}
        if self.mask is not None:
            full = (self.batch, self.heads, self.seqlen_q)
            shape = [1 if one else n for one, n in zip(self.mask, full)]
            options["mask"] = (torch.rand(*shape, self.seqlen_k, generator=g) > 0.4).to(self.device)
        if self.lengths:
            lengths = torch.randint(0, self.seqlen_k + 1, (self.batch,), generator=g)
            options["key_lengths"] = lengths.to(self.device)
        return [q, k, v], options

    def cotangents(self) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(self.seed + 1)
        dout = torch.randn(self.batch, self.seqlen_q, self.heads, self.head_dim, generator=g)
        dlse = torch.randn(self.batch, self.heads, self.seqlen_q, generator=g)
        return dout.to(self.dtype).to(self.device), dlse.to(self.device)


def outputs_and_gradients(
    function: Any, tensors: list[torch.Tensor], dout: torch.Tensor, dlse: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`function(q, k, v) -> (out, lse)` and its gradients, by name."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    # The LSE of a row without a key is -inf, and its gradient has no effect whatever it is.
    torch.autograd.backward([out, lse], [dout.to(out.dtype), dlse.to(lse.dtype)])
    names = ("dq", "dk", "dv")
    return {"out": out, "lse": lse} | {n: x.grad for n, x in zip(names, leaves)}


def formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain formula in the inputs' dtype, written independently of the package."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if causal:
        hidden = torch.ones_like(hidden).triu(1 + seqlen_k - seqlen_q)
    hidden = hidden.expand(q.shape[0], q.shape[1], -1, -1)
    if mask is not None:
        hidden = hidden | ~mask
    if key_lengths is not None:
        hidden = hidden | (
            torch.arange(seqlen_k, device=q.device) >= key_lengths[:, None, None, None]
        )
    scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores.masked_fill(hidden, float("-inf"))
    blind = hidden.all(-1, keepdim=True)
    lse = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, -1)
    p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return (p @ v).permute(0, 2, 1, 3), lse


def check(case: Case, backend: str) -> None:
    """`backend` on `case` against float64 under the rule, outputs and gradients."""
    tensors, options = case.inputs()
    dout, dlse = case.cotangents()
    ours_tensors = tensors
    if case.lengths:  # what lies beyond the lengths must have no effect
        ours_tensors = [tensors[0], *(x.clone() for x in tensors[1:])]
        for b, length in enumerate(options["key_lengths"].tolist()):
            ours_tensors[1][b, length:] = float("nan")
            ours_tensors[2][b, length:] = float("inf")

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if backend == "torch":  # ATen has the LSE without gradients only
            out = fastattn.attention(q, k, v, **options, backend="torch")
            with torch.no_grad():
                if q.device.type != "cpu":
                    return out, plain(q, k, v)[1].detach()
                return out, fastattn.attention(
                    q, k, v, **options, return_lse=True, backend="torch"
                )[1]
        return fastattn.attention(q, k, v, **options, return_lse=True, backend=backend)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return formula(q, k, v, **options)

    if backend == "torch":
        dlse = torch.zeros_like(dlse)
        actual = _without_lse_gradient(ours, ours_tensors, dout)
    else:
        actual = outputs_and_gradients(ours, ours_tensors, dout, dlse)
    eager = outputs_and_gradients(
        plain, tensors, dout, _no_gradient_where_blind(plain, tensors, dlse)
    )
    doubles = [x.double() for x in tensors]
    exact = outputs_and_gradients(
        plain, doubles, dout, _no_gradient_where_blind(plain, doubles, dlse)
    )
    terms = max((exact[n].abs().max().item() for n in ("dq", "dk", "dv")), default=0.0)
    # ATen's fused kernel for the CPU computes its exponentials to 20 bits, 16 units of float32.
    ulps = 16 if backend == "torch" and case.device == "cpu" else 4
    for name, expected in exact.items():
        assert_close_to_reference(
            actual[name], eager[name], expected, name=name, ulps=ulps, terms=terms
        )


def _without_lse_gradient(
    function: Any, tensors: list[torch.Tensor], dout: torch.Tensor
) -> dict[str, torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    out.backward(dout)
    names = ("dq", "dk", "dv")
    return {"out": out, "lse": lse} | {n: x.grad for n, x in zip(names, leaves)}


def _no_gradient_where_blind(
    function: Any, tensors: list[torch.Tensor], dlse: torch.Tensor
) -> torch.Tensor:
    """torch.logsumexp of a row of -inf has a NaN gradient; the definition has zero."""
    with torch.no_grad():
        return dlse.masked_fill(function(*tensors)[1] == float("-inf"), 0.0)
