"""Attention: fastattn against eager PyTorch, SDPA's backends, FlexAttention and other packages.

Self-attention of (batch, seqlen, heads, head_dim), forward or backward. `--feature` adds what a
mask or a score needs beside causality; peers without a word for it get the mask or bias that says
the same, or refuse. The ceiling is a large matrix product in the same dtype. On a GPU `--preset
paper` is FlashAttention's grid (batch * seqlen = 16k, heads * head_dim = 2048), cuDNN's with 64
heads on 8, and a window of 1024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import checkout  # noqa: F401
import torch
from harness import BACKWARD, FORWARD, OURS, Cell
from peer import Peer, Refused, compiled, first, imported, matmul, with_compiled
from script import COMPILE, DIRECTION, DTYPE, Axis, Subject, boolean, grids, main
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

TOKENS = {"cuda": 16384, "cpu": 2048}  # batch * seqlen where the batch is left open
WIDTH = {"cuda": 2048, "cpu": 512}  # heads * head_dim where the heads are left open
FEATURES = ("none", "window", "softcap", "alibi", "bias")
SOFTCAP = 30.0
MATRIX_LIMIT = 4 << 30  # bytes of scores or masks that a peer may build


@dataclass(frozen=True, kw_only=True)
class AttentionCell(Cell):
    """One call. `window` is the number of keys that a query sees where the feature is a window."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    feature: str = "none"
    window: int = 0

    sizes = ("batch", "seqlen", "heads", "kv_heads", "head_dim", "causal")
    bound = "matmul"

    @property
    def axes(self) -> dict[str, Any]:
        feature = {} if self.feature == "none" else {"feature": self.feature}
        window = {"window": self.window} if self.feature == "window" else {}
        return {**super().axes, **feature, **window}

    @property
    def flops(self) -> float:
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        share = 0.5 if self.causal else 1.0
        if self.feature == "window":
            share = min(share, self.window / self.seqlen)
        passes = {FORWARD: 1.0, BACKWARD: 2.5}.get(self.direction, 3.5)
        return forward * share * passes

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v, and the bias (1, heads, seqlen, seqlen) if there is one."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (self.randn(self.batch, self.seqlen, n, self.head_dim) for n in heads)
        if self.feature != "bias":
            return q, k, v
        return q, k, v, self.randn(1, self.heads, self.seqlen, self.seqlen)

    def definition(self, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        return formula(self, q, k, v, *bias)

    def part(self, tensor: Tensor) -> Tensor:
        """One key head of one sequence: in float64 the score matrix of all would not fit."""
        group = self.heads // self.kv_heads
        if tensor.shape[-2:] == (self.seqlen, self.seqlen) and self.feature == "bias":
            return tensor[:, :group]
        return tensor[:1, :, : group if tensor.shape[2] == self.heads else 1]

    @property
    def slopes(self) -> Tensor:
        """ALiBi's, 2^(-8 / heads) and its powers."""
        powers = torch.arange(1, self.heads + 1, device=self.device)
        return torch.exp2(-8.0 * powers / self.heads).float()

    def seen(self) -> Tensor | None:
        """(seqlen, seqlen), True where a key is seen; None if all are."""
        if not self.causal:
            return None
        i = torch.arange(self.seqlen, device=self.device)
        seen = i <= i[:, None]
        return seen & (i > i[:, None] - self.window) if self.feature == "window" else seen


# --- peers ----------------------------------------------------------------------------------------


def ours(cell: AttentionCell) -> Peer:
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


def formula(cell: AttentionCell, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, literally, in the dtype of the inputs."""
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
    """ALiBi's penalty, to be subtracted from the scores: (heads, seqlen, seqlen)."""
    i = torch.arange(cell.seqlen, device=cell.device)
    return (cell.slopes[:, None, None] * (i[:, None] - i).abs()).to(dtype)


def _bounded(cell: AttentionCell, batch: int, what: str) -> None:
    size = batch * cell.heads * cell.seqlen**2 * cell.torch_dtype.itemsize
    if size > MATRIX_LIMIT:
        raise Refused(f"{what} would take {size / 2**30:.0f} GiB")


def eager(cell: AttentionCell) -> Peer:
    _bounded(cell, cell.batch, "the score matrix")
    return Peer(lambda *inputs: formula(cell, *inputs))


def sdpa(cell: AttentionCell) -> Peer:
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
    return lambda cell: replace(sdpa(cell), context=lambda: sdpa_kernel(backend))


sdpa_flash = _forced(SDPBackend.FLASH_ATTENTION)
sdpa_cudnn = _forced(SDPBackend.CUDNN_ATTENTION)
sdpa_efficient = _forced(SDPBackend.EFFICIENT_ATTENTION)


def sdpa_math(cell: AttentionCell) -> Peer:
    _bounded(cell, cell.batch, "the score matrix")
    return _forced(SDPBackend.MATH)(cell)


def flex(cell: AttentionCell) -> Peer:
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


flash_attn_2 = _flash("flash_attn", "flash-attn 2")
flash_attn_3 = _flash("flash_attn_interface", "flash-attn 3")
flash_attn_4 = _flash("flash_attn.cute", "flash-attn 4")


def xformers(cell: AttentionCell) -> Peer:
    fmha = imported("xformers.ops", "xformers", gpu=cell)
    if cell.feature not in ("none", "window"):
        raise Refused("measured without features and with a window")
    if cell.heads != cell.kv_heads:
        raise Refused("grouped heads need another layout there")
    mask = fmha.LowerTriangularMask() if cell.causal else None
    if cell.feature == "window":
        local = fmha.fmha.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask
        mask = local(cell.window)
    return Peer(lambda q, k, v: fmha.memory_efficient_attention(q, k, v, attn_bias=mask))


def cudnn_frontend(cell: AttentionCell) -> Peer:
    """cuDNN's graph of attention, built for the cell by its own Python package; forward."""
    cudnn = imported("cudnn", "nvidia-cudnn-frontend", gpu=cell)
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


PEERS = {
    OURS: ours,
    "matmul": matmul,
    "eager": eager,
    "sdpa": sdpa,
    "sdpa flash": sdpa_flash,
    "sdpa cudnn": sdpa_cudnn,
    "sdpa efficient": sdpa_efficient,
    "sdpa math": sdpa_math,
    "flash-attn 2": flash_attn_2,
    "flash-attn 3": flash_attn_3,
    "flash-attn 4": flash_attn_4,
    "xformers": xformers,
    "cudnn frontend": cudnn_frontend,
}


# --- the script -----------------------------------------------------------------------------------


def automatic(text: str) -> int | str:
    return text if text == "auto" else int(text)


AXES: Mapping[str, Axis] = {
    "batch": Axis("auto: 16384 tokens / seqlen, on a CPU 2048", kind=automatic),
    "seqlen": Axis("queries, and keys"),
    "heads": Axis("auto: 2048 / head_dim, on a CPU 512", kind=automatic),
    "kv_heads": Axis("auto: as many as heads", kind=automatic),
    "head_dim": Axis("of q, k and v"),
    "causal": Axis("yes or no", kind=boolean),
    "feature": Axis("what there is beside causality", kind=str, choices=FEATURES),
    "window": Axis("keys that a query sees, of --feature window"),
    "direction": DIRECTION,
    "dtype": DTYPE,
    "compile": COMPILE,
}


def make(
    *,
    device: str,
    batch: int | str,
    seqlen: int,
    heads: int | str,
    kv_heads: int | str,
    head_dim: int,
    feature: str,
    window: int,
    direction: str,
    compile: bool,
    **same: Any,
) -> AttentionCell | None:
    """The cell of one value for each axis; None where the features exclude each other."""
    batch = max(1, TOKENS[device] // seqlen) if batch == "auto" else int(batch)
    heads = max(1, WIDTH[device] // head_dim) if heads == "auto" else int(heads)
    kv_heads = heads if kv_heads == "auto" else int(kv_heads)
    if heads % kv_heads or (feature == "window" and not same["causal"]):
        return None
    return AttentionCell(
        op="attention", device=device, direction=direction,
        against={**with_compiled(PEERS, compile), **({"flex": flex} if compile else {})},
        batch=1 if feature == "bias" and direction != FORWARD else batch,
        seqlen=seqlen, heads=heads, kv_heads=kv_heads, head_dim=head_dim, feature=feature,
        window=window if feature == "window" else 0, compile=compile, **same,
    )  # fmt: skip


grid = grids(
    dtype=["bfloat16"], batch=["auto"], heads=["auto"], kv_heads=["auto"], head_dim=[128],
    seqlen=[4096], feature=["none"], window=[1024], causal=[True], direction=[FORWARD, BACKWARD],
    compile=[False],
)  # fmt: skip
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BOTH_WAYS = (True, False)
CUDNN = grid(
    seqlen=[2048, 4096, 8192, 16384], causal=BOTH_WAYS, batch=[1], heads=[64], kv_heads=[8]
)
WINDOW = grid(feature=["window"], seqlen=[16384], heads=[16])
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"], "head_dim": [64]}
PRESETS = {
    ("cuda", "quick"): [
        grid(seqlen=[8192], causal=BOTH_WAYS),
        WINDOW,
        grid(feature=["bias"], batch=[4], heads=[16]),
        grid(head_dim=[64, 256], causal=[True]),
        grid(seqlen=[512]),
        grid(dtype=["float32"], seqlen=[2048], head_dim=[64]),
        grid(seqlen=[2048], compile=[True]),
        grid(feature=["softcap", "alibi"], seqlen=[2048]),
        grid(dtype=["float16"], seqlen=[2048], head_dim=[64]),
    ],
    ("cuda", "full"): [
        grid(head_dim=[64, 128, 256], seqlen=[512, 2048, 8192], causal=BOTH_WAYS),
        grid(feature=["window"], seqlen=[4096, 16384, 32768], heads=[16], compile=[True]),
        grid(feature=["softcap", "alibi", "bias"], seqlen=[2048, 4096], compile=[True]),
        grid(head_dim=[40, 80, 96, 192, 512], seqlen=[2048]),
        grid(dtype=["float16", "float32"], head_dim=[64, 128], seqlen=[2048]),
        grid(seqlen=[1000, 1023, 4097]),
        CUDNN,
    ],
    ("cuda", "paper"): [
        grid(head_dim=[64, 128, 256], seqlen=LENGTHS, causal=BOTH_WAYS),
        CUDNN,
        grid(feature=["window"], head_dim=[64], seqlen=[2048, 4096, 8192, 16384, 32768]),
    ],
    ("cpu", "quick"): [
        grid(**CPU, seqlen=[512, 1024, 2048], causal=BOTH_WAYS),
        grid(**CPU, seqlen=[1024], feature=["window"], window=[128], direction=[FORWARD]),
        grid(**CPU, seqlen=[512], feature=["bias", "alibi"]),
    ],
    ("cpu", "full"): [
        grid(**CPU, seqlen=[64, 128, 256, 512, 1024, 2048, 4096], causal=BOTH_WAYS),
        grid(**CPU, seqlen=[512, 2048], feature=["window"], window=[128]),
        grid(**CPU, seqlen=[512], feature=["softcap", "alibi", "bias"], compile=[True]),
        grid(dtype=["bfloat16"], head_dim=[64], seqlen=[512, 1024]),
        grid(dtype=["float32"], seqlen=[512], head_dim=[40, 59, 128]),
        grid(**CPU, seqlen=[512], heads=[8], kv_heads=[2]),
    ],
}  # fmt: skip
SUBJECT = Subject("attention", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
