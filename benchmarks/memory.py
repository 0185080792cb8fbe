"""memory: the peak of a call and what its forward keeps, fastattn against plain PyTorch and others.

`peak_bytes` is the most memory that a call holds at any time beyond what was there before: results,
gradients and everything between. On a GPU the allocator counts it; on the CPU it is the running sum
of the allocations and frees that torch's profiler saw (of torch's own allocator; MKL's and a
compiler's own memory is not seen). `saved_bytes` are the distinct storages that the forward hands
to the backward, without inputs and parameters. Of a training step parameters and the optimiser's
state were there before, gradients were not.

Each was called once before, so that workspaces are there. Nothing is timed, and results are
compared by the other scripts. The ceiling is a promise: attention's memory grows with the sequence,
not with its square (`AttentionMemory`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import attention
import checkout  # noqa: F401
import cross_entropy
import ffn
import gpt_models
import gpt_train
import layer_norm
import torch
from counting import peak_bytes, saved_bytes
from harness import BOTH, FORWARD, OURS, Cell, as_tuple, chosen
from schema import Entry, Row
from script import COMPILE, DTYPE, Axis, Subject, boolean, grids, main
from torch import Tensor

# Bytes that an op may take whatever the length: workspaces; the state of a random generator.
WORKSPACE, STATE = 4 << 20, 1 << 16


# --- cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemoryCell(Cell):
    """The memory of one call."""

    reference = None  # results are compared in the op's own script

    @property
    def limit(self) -> float:  # type: ignore[override]
        return gpt_models.PATIENCE[self.device, self.compile]

    def entry(self, make: Callable[..., Any]) -> Entry:
        """Of the peer that `make` makes."""
        raise NotImplementedError

    def kept(self, ours: Entry) -> bool:
        """Whether the target holds."""
        return True

    def measure(self, seconds: float, peers: Collection[str] | None = None) -> Row:
        """The row; nothing in it takes `seconds`."""
        torch.manual_seed(0)
        if self.compile:
            torch._dynamo.reset()
        against = chosen(self.against, peers, self.bound)
        entries = gpt_models.each(against, lambda name, make: self.entry(make), self.device)
        row = self.row(entries)
        row["right"] = "peak_bytes" in entries[OURS]
        if self.target is not None:
            row["holds"] = row["right"] and self.kept(entries[OURS])
        return row


@dataclass(frozen=True, kw_only=True)
class OpMemory(MemoryCell):
    """A call of the op's own cell `of`, on its inputs and peers."""

    of: Any

    @property
    def axes(self) -> dict[str, Any]:
        return self.of.axes

    def entry(self, make: Callable[..., Any]) -> Entry:
        peer = make(self.of)
        inputs = self.of.inputs()
        if not self.backward:

            def forward_only() -> object:
                with torch.no_grad():
                    return peer.function(*inputs)

            with peer.context():
                forward_only()
                return {"peak_bytes": peak_bytes(forward_only, self.device)}

        leaves = [x.detach().requires_grad_() for x in inputs]
        grads = self.of.gradients(inputs)

        def forward() -> tuple[Tensor, ...]:
            return as_tuple(peer.function(*leaves))

        def both() -> object:
            return torch.autograd.grad(forward(), leaves, grads)

        with peer.context():
            both()
            return {
                "peak_bytes": peak_bytes(both, self.device),
                "saved_bytes": saved_bytes(forward, leaves),
            }


@dataclass(frozen=True, kw_only=True)
class AttentionMemory(OpMemory):
    """Promised are so many bytes a token: `peak_limit` and `saved_limit`, linear in the length."""

    @property
    def token_bytes(self) -> dict[str, float]:
        """Of one token of one sequence: q (out is as large), k and v together, a float32 a head."""
        of, itemsize = self.of, self.torch_dtype.itemsize
        return {
            "q": of.heads * of.head_dim * itemsize,
            "kv": 2 * of.kv_heads * of.head_dim * itemsize,
            "float32": 4 * of.heads,
        }

    @property
    def peak_limit(self) -> float:
        """Forward: out, lse and a copy of q, k, v. With the backward also the gradients of q, k, v
        and out in float32, and a second float32 a head (the sum over out times its gradient).
        """
        of, size = self.of, self.token_bytes
        token = 2 * size["q"] + size["kv"] + size["float32"]
        if self.backward:
            token += 4 / self.torch_dtype.itemsize * (2 * size["q"] + size["kv"]) + size["float32"]
        return of.batch * of.seqlen * token + WORKSPACE

    @property
    def saved_limit(self) -> float:
        """Out and two float32 a head (lse)."""
        of, size = self.of, self.token_bytes
        return of.batch * of.seqlen * (size["q"] + 2 * size["float32"]) + STATE

    def kept(self, ours: Entry) -> bool:
        peak, saved = ours["peak_bytes"], ours.get("saved_bytes", 0)
        return peak <= self.peak_limit and saved <= self.saved_limit


@dataclass(frozen=True, kw_only=True)
class TrainingMemory(MemoryCell):
    """A training step of a GPT: forward, backward, clipping, AdamW. Each peer has new weights."""

    model: str
    batch: int
    seqlen: int

    sizes = ("model", "batch", "seqlen")

    @gpt_models.quiet()
    def entry(self, make: Callable[[gpt_models.Models], gpt_train.Learner]) -> Entry:
        models = gpt_models.Models(self.model, self.device)
        learner = make(models)
        ids = models.random_ids(self.batch, self.seqlen + 1)
        step = gpt_train.training_step(models, learner, ids, self.torch_dtype)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        given = [inputs, targets, *learner.model.parameters()]

        def forward() -> object:
            with gpt_models.autocast(self.device, self.torch_dtype):
                return learner.forward(inputs, targets)

        step()
        return {
            "peak_bytes": peak_bytes(step, self.device),
            "saved_bytes": saved_bytes(forward, given),
        }


# --- the script -----------------------------------------------------------------------------------

OPS = ("attention", "layer_norm", "ffn", "gpt", "linear_cross_entropy")
AGAINST = (OURS, "eager", "sdpa", "compiled")
AXES: Mapping[str, Axis] = {
    "op": Axis("of what", kind=str, choices=OPS),
    "batch": Axis("sequences; of attention and gpt"),
    "seqlen": Axis("tokens of each"),
    "heads": Axis("of attention"),
    "head_dim": Axis("of q, k and v"),
    "causal": Axis("yes or no; of attention", kind=boolean),
    "rows": Axis("tokens of layer_norm, ffn and linear_cross_entropy"),
    "hidden": Axis("of a row; ffn has four times as many units between"),
    "classes": Axis("of linear_cross_entropy"),
    "model": Axis("of gpt", kind=str, choices=tuple(gpt_models.SIZES)),
    "direction": Axis("of a gpt always a training step", kind=str, choices=(FORWARD, BOTH)),
    "dtype": DTYPE,
    "compile": COMPILE,
}  # fmt: skip


def make(
    *, op: str, device: str, direction: str, dtype: str, compile: bool, **sizes: Any
) -> MemoryCell | None:
    """The cell of one value for each axis, of which an op takes those that it has."""
    common: dict[str, Any] = {"device": device, "dtype": dtype, "compile": compile}

    def of_axes(*names: str) -> dict[str, Any]:
        return {**common, **{name: sizes[name] for name in names}}

    if op == "gpt":
        if direction != BOTH or dtype == "float16":  # which would want a scaled loss
            return None
        return TrainingMemory(
            op=op, direction=gpt_train.TRAINING, **of_axes("model", "batch", "seqlen"),
            against={**gpt_train.PEERS, **(gpt_train.COMPILED if compile else {})},
        )  # fmt: skip
    common |= {"direction": direction}
    kind, target, of = OpMemory, None, None
    if op == "attention":
        of = attention.make(
            **of_axes("batch", "seqlen", "heads", "head_dim", "causal"), kv_heads=sizes["heads"],
            feature="none", window=0,
        )  # fmt: skip
        kind, target = AttentionMemory, PROMISE
    elif op == "layer_norm":
        of = layer_norm.make(op=op, residual=False, **of_axes("rows", "hidden"))
    elif op == "linear_cross_entropy":
        of = cross_entropy.make(op=op, **of_axes("rows", "hidden", "classes"))
    else:
        options = {"inner": 0, "activation": "gelu_tanh", "layout": "linear"}
        of = ffn.make(**options, **of_axes("rows", "hidden"))
    if of is None:
        return None
    against = {name: of.against[name] for name in AGAINST if name in of.against}
    return kind(op=of.op, against=against, of=of, target=target, **common)


PROMISE = (
    "linear in seqlen: at most q, k, v, out and lse a token, with a backward also two floats for "
    "each number of those in float32 gradients; out and lse saved"
)

grid = grids(
    batch=[1], seqlen=[4096], heads=[16], head_dim=[128], causal=[True], rows=[8192], hidden=[768],
    classes=[131072], model=["gpt2"], direction=[FORWARD, BOTH], dtype=["bfloat16"],
    compile=[False],
)  # fmt: skip
LENGTHS = (512, 1024, 2048, 4096, 8192)
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"], "head_dim": [64]}
PRESETS = {
    ("cuda", "quick"): [
        grid(op=["attention"], seqlen=LENGTHS),
        grid(op=["layer_norm"], rows=[32768]),
        grid(op=["ffn"]),
        grid(op=["linear_cross_entropy"], direction=[BOTH]),
        grid(op=["gpt"], batch=[8], seqlen=[1024]),
        grid(op=["attention"], compile=[True]),
    ],
    ("cuda", "full"): [
        grid(op=["attention"], seqlen=[*LENGTHS, 16384, 32768], head_dim=[64, 128, 256]),
        grid(op=["attention"], seqlen=LENGTHS, causal=[False]),
        grid(op=["attention"], seqlen=LENGTHS, compile=[True]),
        grid(op=["layer_norm"], rows=[4096, 32768], hidden=[768, 4096], compile=[True]),
        grid(op=["ffn"], hidden=[768, 4096], compile=[True]),
        grid(op=["linear_cross_entropy"], hidden=[768, 2048, 4096], compile=[True]),
        grid(op=["gpt"], batch=[8], seqlen=[256, 512, 1024], compile=[True]),
        grid(op=["gpt"], batch=[4], seqlen=[1024], model=["gpt2-medium", "gpt2-large"]),
    ],
    ("cuda", "paper"): [
        grid(op=["attention"], seqlen=[*LENGTHS, 16384, 32768, 65536]),
        grid(op=["gpt"], batch=[32], seqlen=[1024], compile=[True]),
        grid(op=["gpt"], batch=[4], seqlen=[1024], model=["gpt2-xl"]),
    ],
    ("cpu", "quick"): [
        grid(op=["attention"], **CPU, seqlen=LENGTHS, heads=[1]),
        grid(op=["layer_norm"], **CPU, rows=[4096]),
        grid(op=["ffn"], **CPU, rows=[512]),
        grid(op=["linear_cross_entropy"], **CPU, rows=[512], classes=[32000], direction=[BOTH]),
        grid(op=["gpt"], **CPU, model=["small"], batch=[2], seqlen=[128]),
    ],
    ("cpu", "full"): [
        grid(op=["attention"], **CPU, seqlen=LENGTHS, heads=[1], causal=[True, False]),
        grid(op=["attention"], **CPU, seqlen=[2048], heads=[1], compile=[True]),
        grid(op=["layer_norm"], **CPU, rows=[64, 4096], hidden=[768, 4096]),
        grid(op=["ffn"], **CPU, rows=[64, 512]),
        grid(op=["linear_cross_entropy"], **CPU, rows=[1024], hidden=[128, 768]),
        grid(op=["gpt"], **CPU, batch=[2], seqlen=[256]),
    ],
}
SUBJECT = Subject("memory", __doc__, AXES, PRESETS, make)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
