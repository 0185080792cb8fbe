"""The head of a language model, whose logits are not made for a loss (integrations/deferred.py).

The hypothesis: a `torch.nn.Linear` with as many outputs as the model's largest embedding has rows.
Few logits, as in decoding, are made at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastattn import rule
from fastattn.backends import explanation_of
from fastattn.integrations.deferred import deferred
from fastattn.integrations.proof import Draw, Probe
from fastattn.integrations.recogniser import Recogniser
from fastattn.nn import Linear
from fastattn.ops.common import modes
from fastattn.ops.cross_entropy import IGNORED
from fastattn.ops.linear_cross_entropy import linear_cross_entropy

LARGE = 1 << 20  # logits, from which on they are deferred
ROWS, CLASSES = 13, 389  # of the proof


class HeadSwap(Linear):
    """`torch.nn.Linear` whose output, if it is large, is deferred."""

    @staticmethod
    def recogniser(bound: None) -> Recogniser:
        return HEAD

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _suits(self, input):
            return deferred(input, self.weight, self.bias)
        return super().forward(input)


def _suits(head: torch.nn.Linear, x: torch.Tensor) -> bool:
    if modes.recorded() or modes.transformed():
        return False
    weight, bias = head.weight, head.bias
    parts = (x, weight) if bias is None else (x, weight, bias)
    dtype = modes.autocast_dtype(weight.device.type) or weight.dtype
    return (
        all(type(part) in (torch.Tensor, torch.nn.Parameter) for part in parts)
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() // max(1, x.shape[-1]) * weight.shape[0] >= LARGE
        and x.device == weight.device
        and (modes.autocast_dtype(x.device.type) is not None or x.dtype is dtype)
        and not any(part.is_inference() for part in parts)  # their changes are not counted
    )


def heads(model: torch.nn.Module) -> set[torch.nn.Module]:
    """The modules of `model` that the hypothesis fits."""
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return {
        module
        for module in model.modules()
        if rows
        and getattr(type(module), "_fastattn_original", type(module)) is torch.nn.Linear
        and module.out_features == max(rows)
    }


def _specimen(module: torch.nn.Module) -> torch.nn.Module:
    """A head of fewer classes, to which the same applies."""
    assert isinstance(module, torch.nn.Linear)
    classes = min(module.out_features, CLASSES)
    return torch.nn.Linear(module.in_features, classes, bias=module.bias is not None, device="meta")


def _probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
    assert isinstance(module, torch.nn.Linear)
    return [Probe((draw.normal(*rows, module.in_features),)) for rows in ((1, 1), (2, 7))]


def _premise(module: torch.nn.Module, draw: Draw) -> str | None:
    """Whether the loss of deferred logits is that of logits."""
    assert isinstance(module, torch.nn.Linear)
    parts = [draw.normal(ROWS, module.in_features), *module.parameters()]
    targets = torch.arange(ROWS, device=draw.device) * 31 % module.out_features
    targets[0] = IGNORED

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [part.detach().to(dtype, copy=True).requires_grad_() for part in parts]
        loss = F.cross_entropy(function(*leaves), targets, ignore_index=IGNORED)
        return [loss, *torch.autograd.grad(loss, leaves)]

    runs = run(deferred, draw.dtype), run(F.linear, draw.dtype), run(F.linear, torch.float64)
    for ours, theirs, expected in zip(*runs, strict=True):
        if (broken := rule.compare(ours, theirs, expected).violation) is not None:
            return f"the loss of its logits is off: {broken}"
    return None


def _backend(module: torch.nn.Module, probe: Probe) -> str | None:
    assert isinstance(module, torch.nn.Linear)
    x = probe.args[0].flatten(0, -2)
    targets = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return explanation_of(linear_cross_entropy, x, module.weight, targets, module.bias).backend


HEAD = Recogniser(
    words="head of a language model",
    mixin=HeadSwap,
    probes=_probes,
    backend=_backend,
    premise=_premise,
    specimen=_specimen,
)
