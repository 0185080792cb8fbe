"""The `torch` backend of ffn: calls of ATen's matrix product with the activation between.

Plain differentiable PyTorch. Where no gradient goes through it the hidden layer is activated in
place, which spares a second tensor of its size; ReLU's derivative needs only its result, so it is
always in place. Nothing is in place in a recording (torch.compile, torch.jit.trace).

With `recompute` the whole is a checkpoint (non-reentrant, so double backward and torch.compile
work), which keeps only x. Under torch.func transforms, whose tensors have no saved-tensor hooks,
and where no gradient is wanted there is nothing to keep, and the argument has no effect.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastattn.ops.common import modes
from fastattn.ops.common.activations import activate
from fastattn.ops.ffn.problem import FFNProblem
from fastattn.ops.linear import product


def forward(
    problem: FFNProblem,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> torch.Tensor:
    run = _conv1d if problem.conv1d else _linear
    functional = problem.transformed or modes.recorded()
    tensors = x, w1, b1, w2, b2, gate, gate_bias
    if problem.recompute and problem.needs_grad and not problem.transformed:
        recomputed = functools.partial(run, problem.activation, functional)
        return checkpoint(recomputed, *tensors, use_reentrant=False, preserve_rng_state=False)
    return run(problem.activation, functional, *tensors)


def _linear(
    activation: str,
    functional: bool,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> torch.Tensor:
    # Where gradients are wanted or calls recorded, `product` has nothing to offer.
    multiply = F.linear if functional or torch.is_grad_enabled() else product
    if gate is None:
        hidden = activate(activation, functional, multiply(x, w1, b1))
    else:
        hidden = activate(activation, functional, multiply(x, gate, gate_bias))
        hidden = _multiply(functional, hidden, multiply(x, w1, b1))
    return multiply(hidden, w2, b2)


def _conv1d(
    activation: str,
    functional: bool,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
    pre = _product(rows, w1, b1)
    if gate is None:
        hidden = activate(activation, functional, pre)
    else:
        hidden = activate(activation, functional, _product(rows, gate, gate_bias))
        hidden = _multiply(functional, hidden, pre)
    out = _product(hidden, w2, b2)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], w2.shape[1])


def _product(rows: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(rows, w) if b is None else torch.addmm(b, rows, w)


def _multiply(functional: bool, activated: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activated * up, in place where neither is needed again, unless `functional`."""
    if functional or activated.requires_grad or up.requires_grad:
        return activated * up
    return activated.mul_(up)
