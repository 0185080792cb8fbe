"""gpt_train: a training step of GPT-2 by fastattn, transformers and nanoGPT's recipe.

Next-token prediction on random tokens: forward, backward, gradients clipped to norm 1, fused AdamW;
bfloat16 by autocast over float32 weights, float32 as it is. All peers have the same weights and the
same optimiser. Before they are timed, each one's logits are compared with the definition
(transformers' eager attention in float32; in float64 for a float32 row), and its loss with the
cross-entropy of its own logits.

FLOPs of a step: 6 N a token, N all parameters but the positions, and 12 layers width seqlen a token
for attention, as PaLM (appendix B) and nanoGPT count them: causal attention is NOT halved, what is
recomputed and the padding of a vocabulary do not count. The ceiling is a large matrix product
measured in the same rounds, in the row's dtype. `mfu` is of the peak that the maker states for
dense products in 16 bits; there is none in float32, on a CPU, and on a GPU that `PEAKS` lacks.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import torch
from counting import peak_bytes
from gpt_models import (
    ACCELERATED,
    CLIP,
    SIZES,
    TRANSFORMERS,
    ModelCell,
    Models,
    autocast,
    each,
    no_slower,
    parameters,
)
from harness import OURS, compare, synchronize, timed_interleaved
from peer import matmul
from schema import Entry, Peak, Row
from script import Axis, Subject, boolean, grids, main
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn
from fastattn.timing import Candidate, Sample

TRAINING = "training step"

# TFLOP/s of dense bfloat16 products with float32 sums, by words of the device's name, the first
# that fits: NVIDIA's data sheets (those of Hopper and Ada state twice as much, with sparsity).
PEAKS: Mapping[tuple[str, ...], float] = {
    ("H100", "PCIe"): 756.0,
    ("H100", "NVL"): 835.0,
    ("H100",): 989.0,
    ("H200", "NVL"): 835.0,
    ("H200",): 989.0,
    ("GH200",): 989.0,
    ("A100",): 312.0,
    ("A30",): 165.0,
    ("L40S",): 362.0,
    ("L4",): 121.0,
    ("RTX", "4090"): 165.0,
    ("RTX", "3090"): 71.0,
}
OTHER_CHIPS = {"MIG", "Laptop", "D"}  # words of a name that make it a lesser one
FEW = 128  # tokens whose logits are compared
LOSS_TOLERANCE = 1e-5  # relative: the same logits, summed in another order
NO_SLOWER = "ours and accelerated no slower than transformers, within noise"


def peak_of(name: str) -> float | None:
    """TFLOP/s of the device called so, None if unknown."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if words & OTHER_CHIPS:
        return None
    return next((peak for key, peak in PEAKS.items() if words.issuperset(key)), None)


def peak(device: str) -> Peak | None:
    """The rate that `mfu` is a share of."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    tflops = peak_of(name)
    if tflops is None:
        return None
    return {
        "tflops": tflops,
        "of": f"{name}: dense 16-bit products with float32 sums, as its maker states",
        "flops": (
            "a token 6 N + 12 layers width seqlen, N all parameters but the positions; causal "
            "attention is not halved (nanoGPT, PaLM appendix B)"
        ),
    }


# --- peers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """A model in training. `forward`: ids and targets (B, T) -> logits (B, T, >= V) and the loss.

    The targets are the tokens that follow: nothing is shifted.
    """

    model: nn.Module
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def compiled(learner: Learner) -> Learner:
    return Learner(learner.model, torch.compile(learner.forward, dynamic=False))


def training_step(
    models: Models, learner: Learner, ids: Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    """Forward, backward, clipping and AdamW on the tokens (B, T + 1)."""
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = models.optimizer(learner.model)
    learner.model.train()

    def step() -> None:
        with autocast(models.device, dtype):
            loss = learner.forward(inputs, targets)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(learner.model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(models: Models) -> Learner:
    return Learner(models.ours, models.ours)


def transformers(models: Models, attention: str = "sdpa") -> Learner:
    model = models.transformers(attention)

    def forward(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, labels=ids, shift_labels=targets, use_cache=False)
        return out.logits, out.loss

    return Learner(model, forward)


def accelerated(models: Models) -> Learner:
    learner = transformers(models)
    fastattn.accelerate(learner.model)
    return learner


def nanogpt(models: Models) -> Learner:
    """nanoGPT's recipe, which is all but the compilation: see `PlainGPT` and `training_step`."""
    return Learner(models.plain, models.plain)


PEERS: Mapping[str, Callable[[Models], Learner]] = {
    OURS: ours,
    ACCELERATED: accelerated,
    TRANSFORMERS: transformers,
    "transformers eager": lambda models: transformers(models, "eager"),
    "nanogpt": nanogpt,
}
COMPILED: Mapping[str, Callable[[Models], Learner]] = {
    "nanogpt": lambda models: compiled(nanogpt(models)),
    "ours compiled": lambda models: compiled(ours(models)),
    "transformers compiled": lambda models: compiled(transformers(models)),
}


# --- cells ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainCell(ModelCell):
    """A step on `batch` sequences of `seqlen` tokens."""

    batch: int
    seqlen: int
    dropout: float

    sizes = ("model", "batch", "seqlen", "dropout")
    bound = "matmul"

    @property
    def tokens(self) -> int:
        return self.batch * self.seqlen

    @property
    def flops(self) -> float:
        size = SIZES[self.model]
        attention = 12 * size["n_layer"] * size["n_embd"] * self.seqlen
        return float(self.tokens * (6 * parameters(self.model) + attention))

    @property
    def reference(self) -> str:
        return "float64" if self.dtype == "float32" else "float32"

    def holds(self, samples: Mapping[str, Sample]) -> bool:
        theirs = samples.get(TRANSFORMERS)
        return all(no_slower(samples.get(name), theirs) for name in (OURS, ACCELERATED))

    def run(self, seconds: float) -> Row:
        models = Models(self.model, self.device, self.dropout)
        ids = models.random_ids(self.batch, self.seqlen + 1)
        exact, eager = self.definition_of(models, ids[:1, : min(FEW, self.seqlen)])
        product = matmul(self)
        candidates = [Candidate(self.bound, product.function)]

        def attempt(name: str, make: Callable[[Models], Learner]) -> Entry:
            learner = make(models)
            step = training_step(models, learner, ids, self.torch_dtype)
            start = time.perf_counter()
            step()
            synchronize(self.device)
            entry: Entry = {"first_call_seconds": time.perf_counter() - start}
            entry |= self.check(learner, ids, exact, eager)
            entry["peak_bytes"] = peak_bytes(step, self.device)
            candidates.append(Candidate(name, step))
            return entry

        entries = each(self.against, attempt, self.device)
        entries[self.bound] = {"ceiling": True}
        row = self.row(entries)
        samples = timed_interleaved(self, candidates, seconds, row)
        self.rate(entries, samples, product.flops)
        row["right"] = entries[OURS].get("right", False)
        return row

    def definition_of(self, models: Models, few: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (1, T, V) by eager attention: in the reference's dtype, in the cell's."""
        model = models.transformers("eager").eval()
        with torch.no_grad():
            with autocast(self.device, self.torch_dtype):
                eager = model(few).logits
            precise = copy.deepcopy(model).double() if self.reference == "float64" else model
            return precise(few).logits, eager

    def check(self, learner: Learner, ids: Tensor, exact: Tensor, eager: Tensor) -> Entry:
        """Of the same call as in the step, so that nothing is compiled twice; without dropout."""
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        learner.model.train(self.dropout == 0)
        with autocast(self.device, self.torch_dtype):
            logits, loss = (x.detach() for x in learner.forward(inputs, targets))
        learner.model.train()
        few = logits[:1, : exact.shape[1], : exact.shape[2]]
        errors = compare((few,), (exact,), (eager,))
        entry: Entry = {"errors": errors, "right": all(error["within"] for error in errors)}
        expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).item()
        if not math.isclose(loss.item(), expected, rel_tol=LOSS_TOLERANCE):
            entry["right"] = False
            entry["note"] = f"its loss is {loss.item():.6f}, that of its logits {expected:.6f}"
        return entry

    def rate(
        self, entries: Mapping[str, Entry], samples: Mapping[str, Sample], product: float | None
    ) -> None:
        """Write the rates, and their shares of the ceiling, whose product has so many FLOPs."""
        top = None
        if self.device == "cuda" and self.dtype != "float32":
            top = peak(self.device)
            if top is None:
                name = torch.cuda.get_device_name()
                entries[OURS].setdefault("note", f"no MFU: the peak of {name} is not known here")
        for name, sample in samples.items():
            entry = entries[name]
            flops = product if name == self.bound else self.flops
            entry["tflops"] = flops / sample.median / 1e12
            if name == self.bound:
                continue
            entry["tokens_per_second"] = self.tokens / sample.median
            if top is not None:
                entry["mfu"] = entry["tflops"] / top["tflops"]
        for name in samples:
            entries[name]["share"] = entries[name]["tflops"] / entries[self.bound]["tflops"]


# --- the script -----------------------------------------------------------------------------------

AXES: Mapping[str, Axis] = {
    "model": Axis("size of GPT-2", kind=str, choices=tuple(SIZES)),
    "batch": Axis("sequences of a step"),
    "seqlen": Axis("tokens of each"),
    "dropout": Axis("of embeddings, attention weights and branches", kind=float),
    "dtype": Axis("of the products", kind=str, choices=("bfloat16", "float32")),
    "compile": Axis("have torch.compile take part; a minute to compile a row", kind=boolean),
}


def make(*, device: str, model: str, seqlen: int, compile: bool, **same: Any) -> TrainCell | None:
    """The cell of one value for each axis; None where the model has too few positions."""
    if seqlen > SIZES[model]["n_positions"]:
        return None
    return TrainCell(
        op="gpt", direction=TRAINING, device=device, model=model, seqlen=seqlen, compile=compile,
        against={**PEERS, **(COMPILED if compile else {})},
        target=NO_SLOWER if device == "cpu" and not compile else None,
        **same,
    )  # fmt: skip


grid = grids(
    model=["gpt2"], batch=[8], seqlen=[1024], dropout=[0.0], dtype=["bfloat16"], compile=[False]
)
BOTH_WAYS = (False, True)
SMALL: dict[str, Sequence[Any]] = {"model": ["small"], "batch": [2], "seqlen": [128]}
CPU: dict[str, Sequence[Any]] = {"dtype": ["float32"]}
PRESETS = {
    ("cuda", "quick"): [grid(), grid(compile=[True])],
    ("cuda", "full"): [
        grid(compile=BOTH_WAYS),
        grid(batch=[8, 16, 32], compile=[True]),
        grid(batch=[32], seqlen=[256]),
        grid(batch=[16], seqlen=[512]),
        grid(dropout=[0.1]),
        grid(model=["gpt2-medium"], batch=[8]),
        grid(model=["gpt2-large"], batch=[4]),
        grid(dtype=["float32"], batch=[4]),
    ],
    # llm.c's and nanoGPT's: 124M and 1.5B at 1024 tokens.
    ("cuda", "paper"): [
        grid(batch=[32], compile=BOTH_WAYS),
        grid(model=["gpt2-xl"], batch=[4], compile=BOTH_WAYS),
    ],
    ("cpu", "quick"): [grid(**CPU, **SMALL), grid(**CPU, **SMALL, dropout=[0.1])],
    ("cpu", "full"): [
        grid(**CPU, batch=[2], seqlen=[256]),
        grid(**CPU, **SMALL, dropout=[0.0, 0.1]),
        grid(**CPU, **SMALL, compile=[True]),
    ],
}
METHOD = {
    "errors": "logits of a few tokens against transformers' eager attention in float32, in float64 "
    "for a float32 row; the loss against the cross-entropy of the peer's own logits",
    "flops": "6 N a token, N all parameters but the positions, and 12 layers width seqlen a token "
    "for attention; causal attention is not halved",
}
SUBJECT = Subject(
    "gpt_train",
    __doc__,
    AXES,
    PRESETS,
    make,
    seconds={"cpu": 1.5, "cuda": 8.0},
    peak=peak,
    method=METHOD,
)

if __name__ == "__main__":
    raise SystemExit(main(SUBJECT))
