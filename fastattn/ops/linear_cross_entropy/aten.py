"""The `torch` backend of linear_cross_entropy: chunks of rows on a CPU, else the logits at once.

The logits of a chunk of rows are made, turned into their own gradient in place, and multiplied into
the gradients of x, weight and bias; the next chunk takes the same memory. So nothing of size (N, V)
exists. The gradient of the weight is one buffer, to which the chunks add (gradients.py).

With one number for the result the forward makes the gradients too: they are those of the sum, and
the backward multiplies them by what comes from above. That is three products, as many as eager has.
Where each row has a gradient of its own the backward makes the logits again, which is a fourth.

Rows that do not count are left out of all products.

A few logits are no memory to speak of: F.linear and F.cross_entropy are faster there. On a GPU the
Triton kernels are what saves memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastattn.ops.common import modes
from fastattn.ops.cross_entropy import aten as of_logits
from fastattn.ops.cross_entropy import reference
from fastattn.ops.cross_entropy.problem import Options, check_classes
from fastattn.ops.linear_cross_entropy.gradients import Gradients
from fastattn.ops.linear_cross_entropy.problem import LinearLossProblem

# Logits from which on their memory is what counts; and rows, where the weight's gradient is made in
# float32 beside its own dtype (AMD EPYC, one thread, torch 2.13, 2026-11-29: in bfloat16 128 rows
# of 512 by 32000 classes take 1.8 of eager's time, 512 rows 0.9).
LARGE = 1 << 23
MANY = 512
# Logits of a chunk: many rows, so that each pass over the weight and over its gradient does much
# (the same processor, float32, against F.linear and F.cross_entropy, forward and backward: 1.1x as
# fast for 512 rows of 768 by 50257 classes and 1024 rows of 512 by 131072, 1.3x for 2048 rows of
# 256 by 32000; with 1 << 22 the first one takes 1.07 of eager's time).
CHUNK = 1 << 24
PLAIN = (torch.Tensor, torch.nn.Parameter)


def forward(
    problem: LinearLossProblem,
    x: torch.Tensor,  # (..., D)
    weight: torch.Tensor,  # (V, D)
    targets: torch.Tensor,  # (...)
    bias: torch.Tensor | None,  # (V,)
    class_weight: torch.Tensor | None,  # (V,)
) -> torch.Tensor:
    if not _in_chunks(problem, x, weight):
        logits = F.linear(x, weight, bias)
        return of_logits.composed(logits, targets, class_weight, problem.options)
    return of_operator(problem, "torch", True, x, weight, targets, bias, class_weight)


def of_operator(
    problem: LinearLossProblem,
    backend: str,
    forced: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    class_weight: torch.Tensor | None,
) -> torch.Tensor:
    """A call by the registered operator."""
    options = problem.options
    check_classes(targets, options.ignore_index, problem.classes)
    if problem.autocast:
        x, weight = x.to(problem.dtype), weight.to(problem.dtype)
        bias = None if bias is None else bias.to(problem.dtype)
    summed = options.reduction != "none"
    keep = problem.needs if summed else (False,) * 3
    loss, *_ = torch.ops.fastattn.linear_cross_entropy(
        x, weight, bias, targets, class_weight, summed, keep, *options[:-1], backend, forced
    )
    return reference.reduce(loss, targets, class_weight, options)


def _in_chunks(problem: LinearLossProblem, x: torch.Tensor, weight: torch.Tensor) -> bool:
    if problem.transformed or not x.is_cpu:
        return False
    if torch.compiler.is_compiling():  # no choice may depend on a size
        return not torch.compiler.is_exporting()
    if modes.recorded() or (logits := problem.logits) < LARGE:
        return False
    plain = type(x) in PLAIN and type(weight) in PLAIN
    return plain and (logits >= MANY * problem.classes or problem.dtype.itemsize > 2)


# --- in chunks, as the registered operator has it -------------------------------------------------


def kernel_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    options: Options,
    keep: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, None, tuple[torch.Tensor | None, ...]]:
    """losses (...), no statistics, and those gradients of the losses' sum that `keep` asks for."""
    return _sweep(x, weight, bias, targets, class_weight, options, None, keep)


def kernel_backward(
    dlosses: torch.Tensor,  # (...)
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    statistics: torch.Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    _, _, gradients = _sweep(x, weight, bias, targets, class_weight, options, dlosses, needs)
    return gradients


def _sweep(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    options: Options,
    dlosses: torch.Tensor | None,  # (...), None for ones
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, None, tuple[torch.Tensor | None, ...]]:
    """Once over all rows that count: their losses (...), and the gradients that are needed."""
    dtype, classes = modes.at_least_float32(x.dtype), weight.shape[0]
    rows, flat = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    if dlosses is None:
        dlosses = rows.new_ones((), dtype=dtype).expand(flat.shape)
    dlosses = dlosses.reshape(-1, 1)
    losses = rows.new_zeros(flat.shape, dtype=dtype)
    gradients = Gradients(rows, weight, needs)
    terms = of_logits.Terms(classes, class_weight, options, dtype)
    counted = (flat != options.ignore_index).nonzero().squeeze(1)
    chunks = max(1, -(-len(counted) * classes // CHUNK))
    size = max(1, -(-len(counted) // chunks))
    buffer = gradients.empty_logits(min(size, len(counted)))
    for places in counted.split(size):
        some, logits = rows[places], buffer[: len(places)]
        gradients.logits(some, bias, logits)
        of_targets = flat[places].long().unsqueeze(1)
        losses[places] = _finish(logits, of_targets, terms, dlosses[places], any(needs))
        if any(needs):
            gradients.add(places, some, logits)
    return losses.view(targets.shape), None, gradients.results(x.shape)


def _finish(
    logits: torch.Tensor,
    targets: torch.Tensor,
    terms: of_logits.Terms,
    scale: torch.Tensor,
    gradient: bool,
) -> torch.Tensor:
    """The losses (rows,) of a chunk; with `gradient` the logits become their gradient, in place."""
    losses = []
    at_once = max(1, of_logits.BLOCK // logits.shape[1])
    for parts in zip(*(x.split(at_once) for x in (logits, targets, scale)), strict=True):
        block, of_targets, of_rows = parts
        s = reference.scores(block, terms.options)
        log_p = s.log_softmax(-1)
        losses.append(terms.losses(s, log_p, of_targets).squeeze(1))
        if gradient:
            block.copy_(terms.gradient(s, log_p.exp_(), of_targets, of_rows))
    return torch.cat(losses)
