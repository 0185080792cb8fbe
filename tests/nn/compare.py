"""How a module of ours is compared with torch's: outputs and every gradient, under one rule."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from oracle import assert_all_close_to_reference


def _plain_call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return module(*inputs)


def _run(
    module: torch.nn.Module,
    inputs: list[torch.Tensor],
    call: Callable[..., torch.Tensor],
    grad_out: torch.Tensor | None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    out = call(module, *leaves)
    if grad_out is None:
        grad_out = torch.randn_like(out)
    out.backward(grad_out.to(out.dtype))
    results = {"out": out.detach()}
    results |= {f"grad of input {i}": x.grad for i, x in enumerate(leaves)}
    results |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return results, grad_out


def assert_module_close(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    *inputs: torch.Tensor,
    call: Callable[..., torch.Tensor] = _plain_call,
    call_theirs: Callable[..., torch.Tensor] | None = None,
) -> None:
    """Ours against theirs, with theirs in float64 on the same values as the reference."""
    call_theirs = call_theirs or call
    our_results, grad_out = _run(ours, list(inputs), call, None)
    eager, _ = _run(theirs, list(inputs), call_theirs, grad_out)
    reference, _ = _run(
        copy.deepcopy(theirs).double(), [x.double() for x in inputs], call_theirs, grad_out
    )
    assert our_results.keys() == eager.keys()
    found = {}
    for name, result in our_results.items():
        if result is None:
            assert eager[name] is None, f"{name}: torch's module has a gradient"
            continue
        assert result.dtype == eager[name].dtype, name
        if result.dtype == torch.float64:  # no better reference: the two may differ by rounding
            error = (result - reference[name]).norm()
            assert error <= 1e-13 * reference[name].norm(), f"{name}: off by {error:.2e}"
        else:
            found[name] = (result, eager[name], reference[name])
    assert_all_close_to_reference(found)


class LowRank(torch.nn.Module):
    """A wrapper as LoRA makes it: the wrapped layer plus a product of two thin matrices."""

    def __init__(self, base: torch.nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))
