"""A plain call of few logits on a CPU goes straight to ATen (ops/common/plain.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.common import modes
from fastattn.ops.common.plain import ERRORS, plain
from fastattn.ops.linear_cross_entropy import aten


def run(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor | None:
    """The loss of a call without other options, in float32, or None."""
    try:
        if not (plain(x, weight, bias) and modes.plain()) or x.dtype is not torch.float32:
            return None
        if type(targets) is not Tensor or targets.dtype is not torch.int64 or not targets.is_cpu:
            return None
        if modes.recorded() or type(ignore_index) is not int:
            return None
        if weight.layout is not torch.strided:
            return None
        shape = targets.shape
        classes, features = weight.shape
        if x.shape != (*shape, features) or not 0 < targets.numel() * classes < aten.LARGE:
            return None
        if bias is not None and bias.shape != (classes,):
            return None
        logits = F.linear(x, weight, bias)
        if len(shape) != 1:
            logits, targets = logits.reshape(-1, classes), targets.reshape(-1)
        loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
        return loss.view(shape) if reduction == "none" else loss
    except ERRORS:
        return None
