"""Whom the ops are compared with: one small function per peer and op (models': peers_gpt.py).

Each takes the cell to be measured (shapes, dtype, device, options) and returns a `Peer`, or raises
`Refused` with the reason why it cannot do the cell. All peers of an op take the same tensors in
the same layout and return the same result, transposes included in their time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import checkout  # noqa: F401
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

if TYPE_CHECKING:
    from attention import AttentionCell
    from decode import DecodeCell
    from ffn import FeedForwardCell
    from layer_norm import NormCell

GELU_TANH = {"approximate": "tanh"}
NORM_EPS = 1e-5
MATRIX_LIMIT = 4 << 30  # bytes of scores or masks that a peer may build
SOFTCAP = 30.0
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}

Outputs = Tensor | tuple[Tensor, ...]


class Refused(Exception):
    """A peer is absent or cannot do this cell; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A way to do the cell's work.

    `context` is entered around a batch of calls. A `ceiling` moves bytes or multiplies matrices as
    the op must, without doing its work: it is called as it stands, and its result is not compared.
    `bytes` and `flops` are a call's, where they are not what the cell says.
    """

    function: Callable[..., Outputs]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    ceiling: bool = False
    bytes: float | None = None
    flops: float | None = None
    note: str | None = None


def compiled(peer: Peer) -> Peer:
    """torch.compile of a peer, for static shapes."""
    torch._dynamo.reset()  # all cells share one code object, and it may be recompiled 8 times only
    torch._functorch.config.donated_buffer = False  # the backward is timed with retain_graph
    return replace(peer, function=torch.compile(peer.function, dynamic=False, fullgraph=True))


def imported(module: str, package: str) -> ModuleType:
    """An optional package's module, or Refused."""
    try:
        return importlib.import_module(module)
    except Exception as failure:  # a package built for another torch fails in its own ways
        if isinstance(failure, ModuleNotFoundError) and failure.name == module.split(".")[0]:
            raise Refused(f"{package} is not installed") from None
        raise Refused(f"{package} cannot be imported: {failure}") from failure


def on_a_gpu(cell: Any, package: str) -> None:
    if cell.device != "cuda":
        raise Refused(f"{package} runs on CUDA devices")


def first(result: Any) -> Tensor:
    """The output, of functions that return the LSE too or not, by version."""
    return result if isinstance(result, Tensor) else result[0]


def matmul(cell: Any) -> Peer:
    """A large square product in the cell's dtype: what the device can multiply at best."""
    size = MATMUL_SIZE[cell.device]
    options = {"device": cell.device, "dtype": cell.torch_dtype}
    a, b = (torch.randn(size, size, **options) for _ in range(2))
    return Peer(lambda *_: a @ b, ceiling=True, flops=2.0 * size**3)


# --- attention: q, k, v (batch, seqlen, heads, head_dim), [bias (1, heads, seqlen, seqlen)] -------


def attention_ours(cell: AttentionCell) -> Peer:
    options: dict[str, Any] = {"causal": cell.causal}
    if cell.feature == "window":
        options["window"] = (cell.window - 1, 0)
    elif cell.feature == "softcap":
        options["softcap"] = SOFTCAP
    elif cell.feature == "alibi":
        options["alibi_slopes"] = cell.slopes

    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, bias=bias[0] if bias else None, **options)

    return Peer(call)


def attention_formula(
    cell: AttentionCell, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v as it is written, in the dtype of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, seqlen, head_dim)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if cell.feature == "softcap":
        scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
    if cell.feature == "alibi":
        scores = scores - alibi(cell, scores.dtype)[: scores.shape[1]]
    if bias:
        scores = scores + bias[0]
    if (seen := cell.seen()) is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def alibi(cell: AttentionCell, dtype: torch.dtype) -> Tensor:
    """What ALiBi takes from the scores, (heads, seqlen, seqlen)."""
    i = torch.arange(cell.seqlen, device=cell.device)
    return (cell.slopes[:, None, None] * (i[:, None] - i).abs()).to(dtype)


def _bounded(cell: AttentionCell, batch: int, what: str) -> None:
    size = batch * cell.heads * cell.seqlen**2 * cell.torch_dtype.itemsize
    if size > MATRIX_LIMIT:
        raise Refused(f"{what} would take {size / 2**30:.0f} GiB")


def attention_eager(cell: AttentionCell) -> Peer:
    _bounded(cell, cell.batch, "the score matrix")
    return Peer(lambda *inputs: attention_formula(cell, *inputs))


def attention_compiled(cell: AttentionCell) -> Peer:
    return compiled(attention_eager(cell))


def attention_sdpa(cell: AttentionCell) -> Peer:
    """As PyTorch's users write it: a flag where it has one, else a mask made beforehand."""
    if cell.feature == "softcap":
        raise Refused("F.scaled_dot_product_attention has no softcap")
    mask = None
    if cell.feature == "window":
        mask = cell.seen()
    elif cell.feature == "alibi":
        _bounded(cell, 1, "the mask")
        mask = -alibi(cell, cell.torch_dtype)
        if (seen := cell.seen()) is not None:
            mask = mask.masked_fill(~seen, float("-inf"))
    elif cell.feature == "bias":
        _bounded(cell, 1, "the mask")
    is_causal = cell.causal and cell.feature == "none"
    hidden = None if (seen := cell.seen()) is None else ~seen
    grouped = cell.heads != cell.kv_heads

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        added = mask
        if bias:
            added = bias[0] if hidden is None else bias[0].masked_fill(hidden, float("-inf"))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, added, is_causal=is_causal, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    return Peer(sdpa)


def _forced(backend: SDPBackend) -> Callable[[AttentionCell], Peer]:
    return lambda cell: replace(attention_sdpa(cell), context=lambda: sdpa_kernel(backend))


attention_sdpa_flash = _forced(SDPBackend.FLASH_ATTENTION)
attention_sdpa_cudnn = _forced(SDPBackend.CUDNN_ATTENTION)
attention_sdpa_efficient = _forced(SDPBackend.EFFICIENT_ATTENTION)


def attention_sdpa_math(cell: AttentionCell) -> Peer:
    _bounded(cell, cell.batch, "the score matrix")
    return _forced(SDPBackend.MATH)(cell)


def attention_flex(cell: AttentionCell) -> Peer:
    """torch's FlexAttention, compiled; its block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if cell.feature == "bias" and cell.backward:
        raise Refused("the gradient of a bias in FlexAttention adds with atomics; not compared")
    slopes = cell.slopes if cell.feature == "alibi" else None

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j
        return seen & (i - j < cell.window) if cell.feature == "window" else seen

    blocks = None
    if cell.causal:
        blocks = create_block_mask(rule, None, None, cell.seqlen, cell.seqlen, device=cell.device)

    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if cell.feature == "softcap":
                return SOFTCAP * torch.tanh(s / SOFTCAP)
            if slopes is not None:
                return s - slopes[h] * (i - j).abs()
            return s + bias[0][0, h, i, j] if bias else s

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mod = None if cell.feature in ("none", "window") else score
        grouped = cell.heads != cell.kv_heads
        return flex_attention(
            q, k, v, score_mod=mod, block_mask=blocks, enable_gqa=grouped
        ).transpose(1, 2)

    return compiled(Peer(call))


def _flash_options(cell: AttentionCell, package: str) -> dict[str, Any]:
    """flash-attn's words for the cell's features."""
    if cell.dtype == "float32":
        raise Refused(f"{package} has no float32")
    if cell.feature == "bias":
        raise Refused(f"{package} has no bias")
    options: dict[str, Any] = {"causal": cell.causal}
    if cell.feature == "window":
        options["window_size"] = (cell.window - 1, 0)
    elif cell.feature == "softcap":
        options["softcap"] = SOFTCAP
    elif cell.feature == "alibi":
        if package != "flash-attn 2":
            raise Refused(f"{package} has no ALiBi")
        options["alibi_slopes"] = cell.slopes
    return options


def _flash(module: str, package: str) -> Callable[[AttentionCell], Peer]:
    def make(cell: AttentionCell) -> Peer:
        function = imported(module, package).flash_attn_func
        options = _flash_options(cell, package)
        return Peer(lambda q, k, v: first(function(q, k, v, **options)))

    return make


attention_flash_2 = _flash("flash_attn", "flash-attn 2")
attention_flash_3 = _flash("flash_attn_interface", "flash-attn 3")
attention_flash_4 = _flash("flash_attn.cute", "flash-attn 4")


def attention_xformers(cell: AttentionCell) -> Peer:
    fmha = imported("xformers.ops", "xformers")
    on_a_gpu(cell, "xformers")
    if cell.feature not in ("none", "window"):
        raise Refused("measured without features and with a window")
    if cell.heads != cell.kv_heads:
        raise Refused("grouped heads need another layout there")
    mask = fmha.LowerTriangularMask() if cell.causal else None
    if cell.feature == "window":
        local = fmha.fmha.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask
        mask = local(cell.window)
    return Peer(lambda q, k, v: fmha.memory_efficient_attention(q, k, v, attn_bias=mask))


def attention_cudnn_frontend(cell: AttentionCell) -> Peer:
    """cuDNN's graph of attention, built for the cell by its own Python package; forward."""
    cudnn = imported("cudnn", "nvidia-cudnn-frontend")
    on_a_gpu(cell, "cuDNN")
    if cell.backward or cell.feature not in ("none", "window") or cell.dtype == "float32":
        raise Refused("measured forward in 16 bits, without features and with a window")
    q, k, v = (x.transpose(1, 2) for x in cell.inputs())
    kind = getattr(cudnn.data_type, {"bfloat16": "BFLOAT16", "float16": "HALF"}[cell.dtype])
    graph = cudnn.pygraph(
        io_data_type=kind,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    names = [graph.tensor_like(x) for x in (q, k, v)]
    options: dict[str, Any] = {"use_causal_mask": cell.causal}
    if cell.feature == "window":
        options["diagonal_band_left_bound"] = cell.window
    result, _ = graph.sdpa(
        q=names[0], k=names[1], v=names[2], is_inference=True,
        attn_scale=cell.head_dim**-0.5, **options,
    )  # fmt: skip
    result.set_output(True).set_dim(list(q.shape)).set_stride(list(q.stride()))
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(graph.get_workspace_size(), device=cell.device, dtype=torch.uint8)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        tensors = (x.transpose(1, 2) for x in (q, k, v, out))
        graph.execute(dict(zip((*names, result), tensors)), workspace)
        return out

    return Peer(call)


ATTENTION = {
    "ours": attention_ours,
    "matmul": matmul,
    "eager": attention_eager,
    "sdpa": attention_sdpa,
    "sdpa flash": attention_sdpa_flash,
    "sdpa cudnn": attention_sdpa_cudnn,
    "sdpa efficient": attention_sdpa_efficient,
    "sdpa math": attention_sdpa_math,
    "flash-attn 2": attention_flash_2,
    "flash-attn 3": attention_flash_3,
    "flash-attn 4": attention_flash_4,
    "xformers": attention_xformers,
    "cudnn frontend": attention_cudnn_frontend,
}
ATTENTION_COMPILED = {"compiled": attention_compiled, "flex": attention_flex}


# --- decoding: q (batch, seqlen_q, heads, head_dim), caches of k and v ----------------------------


def _decode(num_splits: int | None) -> Callable[[DecodeCell], Peer]:
    def make(cell: DecodeCell) -> Peer:
        lengths, table = cell.lengths, cell.block_table

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fastattn.attention_with_kv_cache(
                q, k, v, lengths, block_table=table, causal=True, num_splits=num_splits
            )

        return Peer(call)

    return make


def decode_sdpa(cell: DecodeCell) -> Peer:
    if cell.page_size:
        raise Refused("F.scaled_dot_product_attention knows no pages")
    mask = None
    if cell.seqlen_q > 1:
        mask = torch.ones(cell.seqlen_q, cell.seqlen, dtype=torch.bool, device=cell.device)
        mask = mask.tril(cell.seqlen - cell.seqlen_q)
    grouped = cell.heads != cell.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k[:, : cell.seqlen], v[:, : cell.seqlen]))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped).transpose(1, 2)

    return Peer(call)


def decode_eager(cell: DecodeCell) -> Peer:
    return Peer(cell.definition)


def decode_flash_2(cell: DecodeCell) -> Peer:
    function = imported("flash_attn", "flash-attn 2").flash_attn_with_kvcache
    if cell.dtype == "float32":
        raise Refused("flash-attn 2 has no float32")
    if cell.page_size % 256:
        raise Refused("its pages are multiples of 256 keys")
    lengths, table = cell.lengths, cell.block_table
    return Peer(
        lambda q, k, v: function(
            q, k, v, cache_seqlens=lengths, block_table=table, causal=True
        )
    )  # fmt: skip


def decode_flash_3(cell: DecodeCell) -> Peer:
    function = imported("flash_attn_interface", "flash-attn 3").flash_attn_with_kvcache
    if cell.dtype == "float32":
        raise Refused("flash-attn 3 has no float32")
    lengths, table = cell.lengths, cell.block_table
    return Peer(
        lambda q, k, v: first(
            function(q, k, v, cache_seqlens=lengths, page_table=table, causal=True)
        )
    )


def decode_copy(cell: DecodeCell) -> Peer:
    """A copy of what the cache holds: it reads and writes its bytes once each."""
    held = slice(None if cell.page_size else cell.seqlen)
    return Peer(
        lambda q, k, v: (k[:, held].clone(), v[:, held].clone()),
        ceiling=True,
        bytes=2.0 * cell.bytes,
    )


DECODE = {
    "ours": _decode(None),
    "copy": decode_copy,
    "ours by occupancy": _decode(0),
    "eager": decode_eager,
    "sdpa": decode_sdpa,
    "flash-attn 2": decode_flash_2,
    "flash-attn 3": decode_flash_3,
}

# --- layer_norm and rms_norm: x (rows, hidden), weight, [bias], [residual] ------------------------


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
    return compiled(norm_eager(cell))


def norm_liger(cell: NormCell) -> Peer:
    functional = imported("liger_kernel.transformers.functional", "Liger-Kernel")
    on_a_gpu(cell, "Liger-Kernel")
    if cell.residual:
        raise Refused("its LayerNorm takes no residual")
    if cell.op == "rms_norm":
        return Peer(lambda x, w: functional.liger_rms_norm(x, w, NORM_EPS))
    return Peer(lambda x, w, b: functional.liger_layer_norm(x, w, b, NORM_EPS))


def norm_quack(cell: NormCell) -> Peer:
    function = imported("quack", "quack").rmsnorm
    on_a_gpu(cell, "quack")
    if cell.op != "rms_norm":
        raise Refused("quack's LayerNorm has no backward and no bias")
    return Peer(lambda x, w: first(function(x, w, eps=NORM_EPS)))


def norm_copy(cell: NormCell) -> Peer:
    """A copy of x: it reads and writes the bytes of x once each."""
    moved = 2.0 * cell.rows * cell.hidden * cell.torch_dtype.itemsize
    return Peer(lambda x, *_: x.clone(), ceiling=True, bytes=moved)


NORM = {
    "ours": norm_ours,
    "copy": norm_copy,
    "eager": norm_eager,
    "liger": norm_liger,
    "quack": norm_quack,
}
NORM_COMPILED = {"compiled": norm_compiled}


# --- ffn: x (rows, hidden), w1, b1, w2, b2 --------------------------------------------------------


def ffn_ours(cell: FeedForwardCell) -> Peer:
    return Peer(lambda *inputs: fastattn.ffn(*inputs, cell.activation, layout=cell.layout))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda h: F.gelu(h, **GELU_TANH),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def ffn_eager(cell: FeedForwardCell) -> Peer:
    activation = ACTIVATIONS[cell.activation]

    def linear(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(activation(F.linear(x, w1, b1)), w2, b2)

    def conv1d(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.addmm(b2, activation(torch.addmm(b1, x, w1)), w2)

    return Peer(linear if cell.layout == "linear" else conv1d)


def ffn_epilogue(cell: FeedForwardCell) -> Peer:
    """ATen's product with bias and activation in cuBLASLt's epilogue; it has no backward."""
    if cell.backward:
        raise Refused("torch._addmm_activation has no backward")
    on_a_gpu(cell, "the epilogue of cuBLASLt")
    if cell.activation not in ("gelu_tanh", "relu"):
        raise Refused("the epilogue has GELU by tanh and ReLU")
    use_gelu = cell.activation == "gelu_tanh"

    def call(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        if cell.layout == "linear":
            w1, w2 = w1.t(), w2.t()
        h = torch._addmm_activation(b1, x, w1, use_gelu=use_gelu)
        return torch.addmm(b2, h, w2)

    return Peer(call)


def ffn_compiled(cell: FeedForwardCell) -> Peer:
    return compiled(ffn_eager(cell))


def ffn_gemms(cell: FeedForwardCell) -> Peer:
    """The bare matrix products of the direction, without bias and activation."""

    def forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return x @ w1 @ w2

    def backward(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        h = x @ w2.t()  # x stands for the gradient of the output too: the shapes are the same
        return h @ w1.t(), x.t() @ h, h.t() @ x

    def gemms(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Outputs:
        if cell.layout == "linear":
            w1, w2 = w1.t(), w2.t()
        done: tuple[Tensor, ...] = ()
        if cell.direction != "backward":
            done += (forward(x, w1, w2),)
        if cell.backward:
            done += backward(x, w1, w2)
        return done

    return Peer(gemms, ceiling=True)


FFN = {"ours": ffn_ours, "gemms": ffn_gemms, "eager": ffn_eager, "aten epilogue": ffn_epilogue}
FFN_COMPILED = {"compiled": ffn_compiled}
