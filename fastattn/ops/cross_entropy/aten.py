"""The `torch` backend of cross_entropy: F.cross_entropy, and large logits on a CPU by blocks.

Logits are the largest tensor of a training step, and F.cross_entropy makes three more of their
size: the log-probabilities, which it keeps, and two gradients; 16-bit logits one more, in float32.
On a CPU, where fresh memory costs as much as the arithmetic, one gradient is enough: the logits
themselves are kept, and blocks of rows that fit the cache are worked on one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastattn.ops.common import modes
from fastattn.ops.cross_entropy import reference
from fastattn.ops.cross_entropy.problem import LossProblem, Options, check_classes

# Logits from which on memory is what counts: 32 MB, beyond which malloc has none at hand (AMD EPYC,
# one thread, torch 2.13, 2026-11-29, forward and backward against F.cross_entropy: 1.8x as fast for
# 512 x 50257 in float32, 4.5x for 1024 x 8192 in bfloat16, 0.9x for 512 x 8192 in float32).
LARGE = 1 << 23
# Logits of a block: its scores and their exponentials stay in the L2 cache.
BLOCK = 1 << 18


def forward(
    problem: LossProblem,
    logits: torch.Tensor,  # (..., V)
    targets: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (V,)
) -> torch.Tensor:
    options = problem.options
    by_blocks = logits.is_cpu and not problem.transformed and not modes.recorded()
    if not by_blocks or logits.numel() < LARGE or type(logits) is not torch.Tensor:
        return composed(logits, targets, weight, options)
    check_classes(targets, options.ignore_index, logits.shape[-1])
    losses, _ = torch.ops.fastattn.cross_entropy(
        logits, targets, weight, *options[:-1], "torch", True
    )
    return reference.reduce(losses, targets, weight, options)


def composed(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """By F.cross_entropy, differentiable in every way."""
    s = reference.scores(logits, options)
    weight = None if weight is None else weight.to(s.dtype)
    flat = s.dim() == 2
    loss = F.cross_entropy(
        s if flat else s.reshape(-1, s.shape[-1]),
        (targets if flat else targets.reshape(-1)).long(),
        weight,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction=options.reduction,
    )
    if options.reduction == "none" and not flat:
        loss = loss.view(targets.shape)
    if options.z_loss:
        squares = options.z_loss * s.logsumexp(-1).square()
        squares = squares.masked_fill(targets == options.ignore_index, 0.0)
        loss = loss + reference.reduce(squares, targets, weight, options)
    return loss


# --- by blocks, as the registered operator has it -------------------------------------------------


class Terms:
    """The parts of a loss that do not depend on the logits. Columns below are (rows, 1)."""

    def __init__(
        self, classes: int, weight: torch.Tensor | None, options: Options, dtype: torch.dtype
    ) -> None:
        self.options = options
        self.weight = None if weight is None else weight.to(dtype)
        self.share = options.label_smoothing / classes  # of every class
        # What all classes together get of it.
        self.shared: torch.Tensor | float = options.label_smoothing
        if self.weight is not None:
            self.shared = self.share * self.weight.sum()

    def of_targets(self, targets: torch.Tensor) -> torch.Tensor | float:
        """What the target's class gets, a column or one number."""
        kept = 1.0 - self.options.label_smoothing
        return kept if self.weight is None else kept * self.weight[targets]

    def losses(self, s: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A column, of scores (rows, V), their log-softmax and a column of valid classes."""
        losses = -self.of_targets(targets) * log_p.gather(1, targets)
        if self.share:
            all_classes = log_p.sum(-1) if self.weight is None else log_p @ self.weight
            losses -= self.share * all_classes.unsqueeze(1)
        if self.options.z_loss:
            lse = s.amax(-1, keepdim=True) - log_p.amax(-1, keepdim=True)
            losses += self.options.z_loss * lse.square()
        return losses

    def gradient(
        self, s: torch.Tensor, p: torch.Tensor, targets: torch.Tensor, dlosses: torch.Tensor
    ) -> torch.Tensor:
        """The logits' gradient, in place of `p`, the softmax of the scores `s`."""
        scale = dlosses * self.options.logit_scale
        target = self.of_targets(targets) * scale
        all_classes = target + self.shared * scale
        if self.options.z_loss:
            lse = s.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
            all_classes += 2.0 * self.options.z_loss * lse * scale
        p.mul_(all_classes).scatter_add_(1, targets, -target)
        if self.share:
            p.sub_(self.share * scale if self.weight is None else self.share * scale * self.weight)
        if self.options.softcap:
            p.mul_(1.0 - (s / self.options.softcap).square_())
        return p


def kernel_forward(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, None]:
    """losses (...), and no statistics."""
    dtype = modes.at_least_float32(logits.dtype)
    losses = logits.new_empty(targets.numel(), dtype=dtype)
    terms = Terms(logits.shape[-1], weight, options, dtype)
    counts, classes = _classes(targets, options)
    for part, block in _blocks(logits):
        s = reference.scores(block, options)
        losses[part] = terms.losses(s, s.log_softmax(-1), classes[part]).squeeze(1)
    return losses.masked_fill_(~counts, 0.0).view(targets.shape), None


def kernel_backward(
    dlosses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """dlogits, in their shape and dtype."""
    terms = Terms(logits.shape[-1], weight, options, dlosses.dtype)
    counts, classes = _classes(targets, options)
    scale = dlosses.reshape(-1).masked_fill(~counts, 0.0).unsqueeze(1)
    dlogits = logits.new_empty(logits.shape)
    rows = dlogits.view(-1, logits.shape[-1])
    for part, block in _blocks(logits):
        s, out = reference.scores(block, options), rows[part]
        if out.dtype == s.dtype:
            terms.gradient(s, torch.softmax(s, -1, out=out), classes[part], scale[part])
        else:
            out.copy_(terms.gradient(s, s.softmax(-1), classes[part], scale[part]))
    rows.index_fill_(0, (~counts).nonzero().squeeze(1), 0.0)  # also where scores are no numbers
    return dlogits


def _classes(targets: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows count, (N,), and their classes, (N, 1), 0 for the others."""
    targets = targets.reshape(-1)
    counts = targets != options.ignore_index
    return counts, targets.masked_fill(~counts, 0).long().unsqueeze(1)


def _blocks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks (rows, V) of `logits` (..., V) and where they lie among all rows; never a copy."""
    rows = max(1, BLOCK // logits.shape[-1])
    first = 0
    for view in _views(logits):
        for block in view.split(rows):
            yield slice(first, first + len(block)), block
            first += len(block)


def _views(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """The views (rows, V), as few as the strides allow, that `logits` (..., V) consists of."""
    try:
        yield logits.view(-1, logits.shape[-1])
    except RuntimeError:  # rows that are not evenly spaced
        for part in logits:
            yield from _views(part)
