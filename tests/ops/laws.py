"""The laws of every op beyond its numbers, each written once: what torch may do with a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing

import fastattn
from fastattn.backends import Explanation

Tensor = torch.Tensor
Function = Callable[..., Any]

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def opcheck(op: Any, *arguments: Any) -> None:
    """The schema, the derivative and the fake implementation of a registered op fit each other."""
    torch.library.opcheck(op.default, arguments, test_utils=OPCHECKS)


def one_graph(
    step: Function,
    draw: Callable[[int], Sequence[Tensor]],
    weights: Sequence[Tensor] = (),
    frames: int | None = 1,
) -> None:
    """torch.compile makes one graph for all lengths: no break, and it never specialises again.

    Args:
        step: of the tensors that `draw` makes for a length; the results and gradients of the
            compiled one are the same.
        weights: other tensors whose gradients are compared.
        frames: how often torch compiles for the first length. None: more than once, where it meets
            a symbolic float.
    """
    torch._dynamo.reset()
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compilations)
    counts = []
    for length in (6, 9, 13):
        inputs = draw(length)
        wanted = [x for x in (*inputs, *weights) if x.requires_grad]
        upstream: Tensor | None = None
        results = []
        for function in (compiled, step):
            torch.manual_seed(6)
            out = function(*inputs)
            upstream = torch.rand_like(out) if upstream is None else upstream
            results.append([out, *torch.autograd.grad(out, wanted, upstream)])
        torch.testing.assert_close(*results)
        counts.append(compilations.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1
    assert frames in (None, counts[0])


def functional_transforms(ours: Function, formula: Function, x: Tensor) -> None:
    """jvp, grad, vmap and Hessian-vector products against the formula; never a silent zero."""
    t = torch.randn_like(x)
    _, tangent = torch.func.jvp(ours, (x,), (t,))
    torch.testing.assert_close(tangent, torch.func.jvp(formula, (x,), (t,))[1])
    assert tangent.abs().max() > 0
    gradients = [torch.func.grad(lambda x, f=f: f(x).pow(3).sum()) for f in (ours, formula)]
    torch.testing.assert_close(*(gradient(x) for gradient in gradients))
    torch.testing.assert_close(*(torch.func.jvp(f, (x,), (t,))[1] for f in gradients))
    stacked = torch.stack([x, t])
    expected = torch.stack([formula(x), formula(t)])
    torch.testing.assert_close(torch.func.vmap(ours)(stacked), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        out = torch.autograd.forward_ad.unpack_dual(ours(dual))
        torch.testing.assert_close(out.tangent, tangent)


def kernels_refuse_transforms(ours: Function, x: Tensor) -> None:
    """A kernel would give a tangent of zeros: it says so instead."""
    with pytest.raises(fastattn.UnsupportedError, match="forward-mode"):
        torch.func.jvp(ours, (x,), (x,))
    with pytest.raises(fastattn.UnsupportedError, match=r"torch\.func"):
        torch.func.vmap(ours)(x[None])


def second_derivative(
    kernel: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    power: int = 2,
) -> None:
    """By every input and by the cotangents, through the registered backward.

    The function that is derived is the sum of the first gradients to some `power`.
    """

    def second(function: Function) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        leaves, directions = (
            [x.clone().requires_grad_() for x in given] for given in (inputs, cotangents)
        )
        outs = function(*leaves)
        first = torch.autograd.grad(outs, leaves, directions, create_graph=True)
        total = sum(g.float().pow(power).sum() for g in first)
        return torch.autograd.grad(
            total, [*leaves, *directions], materialize_grads=True, allow_unused=True
        )

    for ours, expected in zip(second(kernel), second(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def batched_cotangents(kernel: Function, reference: Function, x: Tensor) -> None:
    """A Jacobian by `is_grads_batched`, as torch.autograd.functional takes it."""
    x = x.clone().requires_grad_()
    directions = torch.randn(4, *x.shape, device=x.device)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(f(x), x, directions, is_grads_batched=True)
            for f in (kernel, reference)
        )
    )


def went_straight(straight: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that could went straight, by the op's module `straight`."""
    went: list[bool] = []
    run = straight.run

    def spy(*call: Any) -> Any:
        result = run(*call)
        went.append(result is not None)
        return result

    monkeypatch.setattr(straight, "run", spy)
    return went


def copies_are_told(
    explanation: Explanation, call: Callable[..., Any], **tensors: torch.Tensor
) -> None:
    """`explain` names those matrices of which a Gluon call's kernels read a copy, and no other."""
    from fastattn.ops.common import gluon

    read: list[int] = []

    def spy(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        read.extend(x.base.data_ptr() for x in args if hasattr(x, "block_shape"))

    with mock.patch.object(gluon, "launch", spy), torch.no_grad():
        call(**tensors)
    matrices = [name for name, x in tensors.items() if x.dim() > 1]
    copied = [name for name in matrices if tensors[name].data_ptr() not in read]
    told = re.findall(r"after a copy of (.*?):", explanation.remark or "")
    assert told == ([" and ".join(copied)] if copied else [])
