"""The laws of every op beyond its numbers, each written once: what torch may do with a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.backends import Explanation
from oracle import assert_close_to_reference

Tensor = torch.Tensor
Function = Callable[..., Any]

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def results(
    function: Function,
    inputs: dict[str, Tensor],
    *cotangents: Tensor,
    names: Sequence[str] = ("out",),
    trained: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """`function(**inputs)`, of which `names` are the results', and its gradients, all by name.

    Args:
        trained: the inputs that want a gradient; default: all that can have one.
    """

    def wants(name: str) -> bool:
        return inputs[name].is_floating_point() if trained is None else name in trained

    leaves = {name: x.detach().requires_grad_(wants(name)) for name, x in inputs.items()}
    found = function(**leaves)
    outs = found if isinstance(found, tuple) else (found,)
    wanted = {f"d{name}": x for name, x in leaves.items() if x.requires_grad}
    given = [c.to(y.dtype) for c, y in zip(cotangents, outs, strict=False)]
    grads = torch.autograd.grad(outs, list(wanted.values()), given, allow_unused=True)
    named = dict(zip(names, outs, strict=False))
    return named | {n: x for n, x in zip(wanted, grads, strict=True) if x is not None}


def held(
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    case: object,
    **factors: float,
) -> dict[str, Tensor]:
    """`ours`, each within the rule and in the dtype of eager's."""
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype, f"{name}: {value.dtype}, not {eager[name].dtype}"
        assert_close_to_reference(
            value, eager[name], exact[name], name=f"{name} of {case}", **factors
        )
    return ours


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


class Operands(TorchDispatchMode):
    """The first operands of the operators of these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.seen = names, list[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.names:
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


def same_bits(
    run: Callable[[], dict[str, Tensor]],
    times: int = 2,
    before: Callable[[int], None] = lambda number: None,
) -> dict[str, Tensor]:
    """The results of `run`, the same in every run; `before` them another schedule is chosen."""
    first: dict[str, Tensor] = {}
    for number in range(times):
        before(number)
        found = run()
        first = first or found
        for name, value in first.items():
            assert torch.equal(value, found[name]), name
    return first


def kept(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that autograd keeps of a call for its backward."""
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        function()
    return tensors


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


def bad_rows_stay_alone(function: Function, inputs: dict[str, Tensor], cotangent: Tensor) -> None:
    """NaN or Inf in two of 6 rows of x leave the others, in the same tile, as they were."""
    bad = inputs["x"].clone()
    bad[1, 3], bad[4, 0] = float("nan"), float("inf")
    clean = results(function, inputs, cotangent)
    spoilt = results(function, inputs | {"x": bad}, cotangent)
    for name in ("out", "dx"):
        assert torch.equal(spoilt[name][[0, 2, 3, 5]], clean[name][[0, 2, 3, 5]])
    assert spoilt["out"][1].isnan().all() and not spoilt["out"][4].isfinite().all()


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
    leaves = stacked.clone().requires_grad_()  # a transform inside of autograd
    torch.func.vmap(ours)(leaves).sum().backward()
    of_sum = torch.func.vmap(torch.func.grad(lambda x: formula(x).sum()))(stacked)
    torch.testing.assert_close(leaves.grad, of_sum)
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
