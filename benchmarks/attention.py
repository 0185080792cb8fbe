"""Attention: fastattn against eager PyTorch, SDPA's backends, FlexAttention and other packages.

Self-attention of (batch, seqlen, heads, head_dim), forward or backward. `--feature` adds what a
mask or a score needs beside causality; peers without a word for it get the mask or bias that says
the same, or refuse. The ceiling is a large matrix product in the same dtype. On a GPU `--preset
paper` is FlashAttention's grid (batch * seqlen = 16k, heads * head_dim = 2048), cuDNN's with 64
heads on 8, and a window of 1024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import peers
import torch
from harness import BACKWARD, DIRECTIONS, FORWARD, Cell
from script import Axis, Grid, Subject, boolean, main
from torch import Tensor

TOKENS = {"cuda": 16384, "cpu": 2048}  # batch * seqlen where the batch is left open
WIDTH = {"cuda": 2048, "cpu": 512}  # heads * head_dim where the heads are left open
FEATURES = ("none", "window", "softcap", "alibi", "bias")


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
    compile: bool = False

    bound = "matmul"

    @property
    def axes(self) -> dict[str, Any]:
        names = ("batch", "seqlen", "heads", "kv_heads", "head_dim", "causal")
        axes = {name: getattr(self, name) for name in names}
        if self.feature != "none":
            axes["feature"] = self.feature
        if self.feature == "window":
            axes["window"] = self.window
        if self.compile:
            axes["compile"] = True
        return axes

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
        options: dict[str, Any] = {"device": self.device, "dtype": self.torch_dtype}
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (torch.randn(self.batch, self.seqlen, n, self.head_dim, **options) for n in heads)
        if self.feature != "bias":
            return q, k, v
        return q, k, v, torch.randn(1, self.heads, self.seqlen, self.seqlen, **options)

    def definition(self, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        return peers.attention_formula(self, q, k, v, *bias)

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
    "direction": Axis("what is timed", kind=str, choices=DIRECTIONS),
    "dtype": Axis("of the tensors", kind=str, choices=("bfloat16", "float16", "float32")),
    "compile": Axis("have torch.compile's peers take part; seconds to compile a row", kind=boolean),
}


def make(
    *,
    device: str,
    batch: int | str,
    seqlen: int,
    heads: int | str,
    kv_heads: int | str,
    head_dim: int,
    causal: bool,
    feature: str,
    window: int,
    direction: str,
    dtype: str,
    compile: bool,
) -> AttentionCell | None:
    """The cell of one value for each axis; None where the features exclude each other."""
    batch = max(1, TOKENS[device] // seqlen) if batch == "auto" else int(batch)
    heads = max(1, WIDTH[device] // head_dim) if heads == "auto" else int(heads)
    kv_heads = heads if kv_heads == "auto" else int(kv_heads)
    if heads % kv_heads or (feature == "window" and not causal):
        return None
    return AttentionCell(
        op="attention",
        device=device,
        dtype=dtype,
        direction=direction,
        against={**peers.ATTENTION, **(peers.ATTENTION_COMPILED if compile else {})},
        batch=1 if feature == "bias" and direction != FORWARD else batch,
        seqlen=seqlen,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        causal=causal,
        feature=feature,
        window=window if feature == "window" else 0,
        compile=compile,
    )


def grid(**axes: Sequence[Any]) -> Grid:
    """The axes named, the others at what is common."""
    common: dict[str, Sequence[Any]] = {
        "dtype": ["bfloat16"], "batch": ["auto"], "heads": ["auto"], "kv_heads": ["auto"],
        "head_dim": [128], "seqlen": [4096], "feature": ["none"], "window": [1024],
        "causal": [True], "direction": [FORWARD, BACKWARD], "compile": [False],
    }  # fmt: skip
    return {**axes, **{name: values for name, values in common.items() if name not in axes}}


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
