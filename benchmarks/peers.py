"""Whom we are compared with: one small function per peer and op.

Each takes the cell to be measured (shapes, dtype, device, options) and returns a `Peer`, or raises
`Refused` with the reason why it cannot do the cell. All peers of an op take the same tensors in
the same layout and return the same result, transposes included in their time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import checkout  # noqa: F401
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

if TYPE_CHECKING:
    from attention import AttentionCell
    from ffn import FeedForwardCell
    from layer_norm import NormCell

GELU_TANH = {"approximate": "tanh"}
NORM_EPS = 1e-5
EAGER_SCORES_LIMIT = 4 << 30

Outputs = Tensor | tuple[Tensor, ...]


class Refused(Exception):
    """A peer is absent or cannot do this cell; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A way to do the cell's work.

    `context` is entered around a batch of calls. A `ceiling` moves bytes or multiplies matrices as
    the op must, without doing its work: it is called as it stands, and its result is not compared.
    `bytes` is what a call moves, where that is not what the cell says.
    """

    function: Callable[..., Outputs]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    ceiling: bool = False
    bytes: float | None = None


def compiled(peer: Peer, device: str) -> Peer:
    """torch.compile of a peer, for static shapes. On the CPU only the logic is rehearsed."""
    torch._dynamo.reset()  # all cells share one code object, and it may be recompiled 8 times only
    torch._functorch.config.donated_buffer = False  # the backward is timed with retain_graph
    backend = "inductor" if device == "cuda" else "aot_eager"
    function = torch.compile(peer.function, dynamic=False, fullgraph=True, backend=backend)
    return Peer(function, peer.context)


# --- attention: q, k, v (batch, seqlen, heads, head_dim) ----------------------------------------


def attention_ours(cell: AttentionCell) -> Peer:
    return Peer(lambda q, k, v: fastattn.attention(q, k, v, causal=cell.causal))


def attention_formula(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v as it is written, in the dtype of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, seqlen, head_dim)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attention_eager(cell: AttentionCell) -> Peer:
    size = cell.batch * cell.heads * cell.seqlen**2 * cell.torch_dtype.itemsize
    if size > EAGER_SCORES_LIMIT:
        raise Refused(f"the score matrix would take {size / 2**30:.0f} GiB")
    return Peer(lambda q, k, v: attention_formula(q, k, v, cell.causal))


def attention_compiled(cell: AttentionCell) -> Peer:
    return compiled(attention_eager(cell), cell.device)


def attention_sdpa(cell: AttentionCell) -> Peer:
    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal).transpose(1, 2)

    return Peer(sdpa)


def _forced(backend: SDPBackend) -> Callable[[AttentionCell], Peer]:
    return lambda cell: Peer(attention_sdpa(cell).function, lambda: sdpa_kernel(backend))


attention_sdpa_flash = _forced(SDPBackend.FLASH_ATTENTION)
attention_sdpa_cudnn = _forced(SDPBackend.CUDNN_ATTENTION)
attention_sdpa_efficient = _forced(SDPBackend.EFFICIENT_ATTENTION)


def attention_sdpa_math(cell: AttentionCell) -> Peer:
    attention_eager(cell)  # the score matrix is built here too, under the same limit
    return _forced(SDPBackend.MATH)(cell)


ATTENTION = {
    "ours": attention_ours,
    "eager": attention_eager,
    "sdpa": attention_sdpa,
    "sdpa flash": attention_sdpa_flash,
    "sdpa cudnn": attention_sdpa_cudnn,
    "sdpa efficient": attention_sdpa_efficient,
    "sdpa math": attention_sdpa_math,
}
ATTENTION_COMPILED = {
    "ours": attention_ours,
    "eager": attention_eager,
    "compiled": attention_compiled,
}

# --- layer_norm and rms_norm: x (rows, hidden), weight, [bias], [residual] ----------------------


def norm_ours(cell: NormCell) -> Peer:
    if cell.op == "rms_norm":
        return Peer(lambda x, w: fastattn.rms_norm(x, w, NORM_EPS))
    if cell.residual:
        return Peer(lambda x, w, b, r: fastattn.layer_norm(x, w, b, residual=r))
    return Peer(lambda x, w, b: fastattn.layer_norm(x, w, b))


def norm_eager(cell: NormCell) -> Peer:
    shape = (cell.hidden,)
    if cell.op == "rms_norm":
        return Peer(lambda x, w: F.rms_norm(x, shape, w, NORM_EPS))
    if not cell.residual:
        return Peer(lambda x, w, b: F.layer_norm(x, shape, w, b))

    def with_residual(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Outputs:
        total = x + r
        return F.layer_norm(total, shape, w, b), total

    return Peer(with_residual)


def norm_compiled(cell: NormCell) -> Peer:
    return compiled(norm_eager(cell), cell.device)


def norm_copy(cell: NormCell) -> Peer:
    """A copy of x: it reads and writes the bytes of x once each."""
    moved = 2.0 * cell.rows * cell.hidden * cell.torch_dtype.itemsize
    return Peer(lambda x, *_: x.clone(), ceiling=True, bytes=moved)


NORM = {"ours": norm_ours, "eager": norm_eager, "copy": norm_copy}
NORM_COMPILED = {**NORM, "compiled": norm_compiled}


# --- ffn: x (rows, hidden), w1, b1, w2, b2 ------------------------------------------------------


def ffn_ours(cell: FeedForwardCell) -> Peer:
    return Peer(lambda *inputs: fastattn.ffn(*inputs, layout=cell.layout))


def ffn_eager(cell: FeedForwardCell) -> Peer:
    def linear(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), **GELU_TANH), w2, b2)

    def conv1d(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.addmm(b2, F.gelu(torch.addmm(b1, x, w1), **GELU_TANH), w2)

    return Peer(linear if cell.layout == "linear" else conv1d)


def ffn_compiled(cell: FeedForwardCell) -> Peer:
    return compiled(ffn_eager(cell), cell.device)


def ffn_gemms(cell: FeedForwardCell) -> Peer:
    """The bare matrix products of the direction, two or four, without bias and activation."""

    def gemms(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Outputs:
        if cell.layout == "linear":
            w1, w2 = w1.t(), w2.t()
        if not cell.backward:
            return x @ w1 @ w2
        h = x @ w2.t()  # x stands for the gradient of the output too: the shapes are the same
        return h @ w1.t(), x.t() @ h, h.t() @ x

    return Peer(gemms, ceiling=True)


FFN = {"ours": ffn_ours, "eager": ffn_eager, "gemms": ffn_gemms}
FFN_COMPILED = {**FFN, "compiled": ffn_compiled}
