"""Problems of cross_entropy and linear_cross_entropy: drawn from a seed, held to the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from ops import laws

import fastattn
from fastattn.ops.cross_entropy import IGNORED
from oracle import assert_close_to_reference

Tensor = torch.Tensor
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One problem: of linear_cross_entropy if it has `features`."""

    shape: tuple[int, ...]  # of the targets
    classes: int
    features: int | None = None
    dtype: torch.dtype = FLOAT
    bias: bool = False
    weighted: bool = False  # by class
    scale: float = 3.0  # of the logits
    offset: float = 0.0  # of the logits
    ignored: float = 0.2  # share of the targets
    targets: torch.dtype = torch.int64
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0

    @property
    def reduction(self) -> str:
        return self.options.get("reduction", "mean")

    def inputs(self) -> dict[str, Tensor]:
        """Those with a gradient."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=g)).to(self.dtype).to(self.device)

        if self.features is None:
            logits = normal(*self.shape, self.classes, scale=self.scale)
            return {"logits": logits + self.offset}
        scale = self.scale / max(1, self.features) ** 0.5
        tensors = {
            "x": normal(*self.shape, self.features),
            "weight": normal(self.classes, self.features, scale=scale),
        }
        return tensors | ({"bias": normal(self.classes)} if self.bias else {})

    def others(self) -> tuple[Tensor, Tensor | None]:
        """Targets, and the weights of the classes."""
        g = torch.Generator().manual_seed(self.seed + 1)
        targets = torch.randint(self.classes, self.shape, generator=g)
        ignore_index = self.options.get("ignore_index", IGNORED)
        targets[torch.rand(self.shape, generator=g) < self.ignored] = ignore_index
        weight = torch.rand(self.classes, generator=g) + 0.1 if self.weighted else None
        weight = weight if weight is None else weight.to(self.device)
        return targets.to(self.targets).to(self.device), weight

    def on(self, backend: str | None) -> Case:
        """The case as `backend` takes it: on `gluon` in 16 bits, with features in steps of 8."""
        if backend != "gluon":
            return self
        assert self.features is not None
        dtype = HALF if self.dtype == FLOAT else self.dtype
        return replace(self, dtype=dtype, features=-(-self.features // 8) * 8)

    def ours(self, backend: str | None) -> Callable[..., Tensor]:
        targets, weight = self.others()

        def run(**inputs: Tensor) -> Tensor:
            if self.features is None:
                return fastattn.cross_entropy(
                    inputs["logits"], targets, weight=weight, backend=backend, **self.options
                )
            return fastattn.linear_cross_entropy(
                inputs["x"], inputs["weight"], targets, inputs.get("bias"), class_weight=weight,
                backend=backend, **self.options,
            )  # fmt: skip

        return run

    def eager(self, **inputs: Tensor) -> Tensor:
        """What a user of torch writes."""
        options = dict(self.options)
        s = self._logits(inputs).float()
        s = s * options.pop("logit_scale", 1.0)
        if cap := options.pop("softcap", 0.0):
            s = torch.tanh(s / cap) * cap
        z_loss, reduction = options.pop("z_loss", 0.0), options.pop("reduction", "mean")
        targets, weight = self.others()
        flat, of = targets.flatten().long(), s.flatten(0, -2) if s.dim() > 1 else s[None]
        losses = F.cross_entropy(of, flat, weight, reduction="none", **options)
        counts = flat != options.get("ignore_index", IGNORED)
        losses = losses + z_loss * of.logsumexp(-1).square() * counts
        if reduction == "none":
            return losses.view(self.shape)
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / (counts.sum() if weight is None else weight[flat[counts]].sum())

    def definition(self, **inputs: Tensor) -> Tensor:
        """The formula, row by row of those that count, in the inputs' dtype."""
        options = self.options
        s = self._logits(inputs) * options.get("logit_scale", 1.0)
        if cap := options.get("softcap", 0.0):
            s = torch.tanh(s / cap) * cap
        targets, weight = self.others()
        flat, of = targets.flatten().long(), s.reshape(-1, self.classes)
        w = torch.ones(self.classes, device=self.device) if weight is None else weight
        w = w.to(s.dtype)
        smoothing, losses, divisor = options.get("label_smoothing", 0.0), [], of.new_zeros(())
        for row, t in zip(of, flat.tolist(), strict=True):
            if t == options.get("ignore_index", IGNORED):
                losses.append(row[:0].sum())  # 0, and a part of the graph
                continue
            lse = row.logsumexp(0)
            loss = (1 - smoothing) * w[t] * (lse - row[t])
            if smoothing:
                loss = loss + smoothing / self.classes * (w * (lse - row)).sum()
            losses.append(loss + options.get("z_loss", 0.0) * lse.square())
            divisor = divisor + w[t]
        all_losses = torch.stack(losses) if losses else of.sum(-1)
        if self.reduction == "none":
            return all_losses.view(self.shape)
        return all_losses.sum() / (divisor if self.reduction == "mean" else 1)

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.features is None:
            return inputs["logits"]
        return F.linear(inputs["x"], inputs["weight"], inputs.get("bias"))


def outputs_and_gradients(
    run: Callable[..., Tensor], inputs: dict[str, Tensor], cotangent: Tensor
) -> dict[str, Tensor]:
    """`run(**inputs)` and its gradients, by name."""
    return laws.results(run, inputs, cotangent, names=("loss",))


def check(
    case: Case, backend: str | None, inputs: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The loss, dtypes and all gradients of `backend` under the rule; they are returned by name."""
    inputs = case.inputs() if inputs is None else inputs
    g = torch.Generator().manual_seed(case.seed + 2)
    shape = case.shape if case.reduction == "none" else ()
    cotangent = torch.randn(shape, generator=g).to(case.device)
    ours = outputs_and_gradients(case.ours(backend), inputs, cotangent)
    eager = outputs_and_gradients(case.eager, inputs, cotangent)
    exact = outputs_and_gradients(case.definition, laws.doubled(inputs), cotangent)
    factors = {"max_factor": 3.0, "rms_factor": 2.0} if case.options.get("softcap") else {}
    for name, value in ours.items():
        if name == "loss":
            assert value.dtype == (DOUBLE if case.dtype == DOUBLE else FLOAT)
        else:
            assert value.dtype == case.dtype
        of = f"{name} of {case} on {backend}"
        assert_close_to_reference(value, eager[name], exact[name], name=of, **factors)
    return ours


# A value of each option, and those that meet in one formula together.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "label_smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0, "reduction": "sum"},
    "z_loss": {"z_loss": 1e-2, "reduction": "none"},
    "logit_scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0, "reduction": "none"},
    "ignore_index": {"ignore_index": 3},
    "everything": {
        "label_smoothing": 0.2, "z_loss": 1e-3, "logit_scale": 0.5, "softcap": 4.0,
        "reduction": "none",
    },
    "everything, mean": {
        "label_smoothing": 0.2, "z_loss": 1e-3, "logit_scale": 0.5, "softcap": 4.0,
    },
}  # fmt: skip
