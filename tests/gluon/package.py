"""The package's kernels as subjects for mutants: calls of the public function, and their bugs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import fastattn
from fastattn.ops.attention import gluon as room
from fastattn.ops.common import gluon as kernels
from fastattn.ops.common import gluon_products
from fastattn.ops.cross_entropy import reference as losses
from fastattn.ops.cross_entropy.problem import IGNORED, Options
from fastattn.ops.ffn import gluon as ffn
from fastattn.ops.linear_cross_entropy import gluon as loss
from oracle import assert_all_close_to_reference

from .launching import launch

ROOM = Path(room.__file__).parent
PRODUCTS = Path(gluon_products.__file__)
FFN = Path(ffn.__file__).parent
LOSS = Path(loss.__file__).parent
# Batch, queries, keys, heads, heads of K and V, head_dim, that of V, and features. Between them: both edges
# of a band, rows that see no key, a padded head_dim, tiles that end inside of a head and of a box;
# dQ in any order, of more heads than start in turn.
FORWARDS: list[tuple[Any, ...]] = [
    (2, 200, 191, 4, 2, 64, 64, {}),
    (1, 300, 520, 1, 1, 64, 64, {"causal": True}),
    (1, 130, 700, 2, 1, 64, 64, {"window": (150, 40)}),
    (1, 130, 400, 2, 2, 72, 40, {"causal": True, "sink": True}),
    (2, 140, 14, 2, 1, 64, 64, {"causal": True}),
    (1, 90, 511, 3, 1, 128, 64, {"alibi_slopes": True, "softcap": 20.0}),
    (2, 70, 300, 1, 1, 64, 64, {"key_lengths": (300, 130)}),
    (1, 128, 448, 1, 1, 256, 256, {"causal": "top_left"}),
]
BACKWARDS: list[tuple[Any, ...]] = [
    (2, 256, 300, 2, 1, 64, 64, {}),
    (1, 300, 200, 1, 1, 64, 64, {"causal": True}),
    (1, 391, 129, 2, 2, 128, 96, {"causal": True, "sink": True}),
    (1, 200, 300, 2, 1, 64, 64, {"window": (90, 30)}),
    (1, 256, 300, 1, 1, 72, 64, {"low": True}),
    (2, 70, 300, 2, 1, 64, 64, {"alibi_slopes": True, "softcap": 20.0, "key_lengths": (300, 130)}),
    (1, 174, 239, 2, 1, 64, 64, {"window": (60, 0), "packed": ((70, 140), (30, 50), (65, 20))}),
    (3, 70, 140, 3, 3, 64, 64, {"deterministic": False}),
]

# Of ffn: tokens, in_features, hidden, activation, whether gated; the last has the layout conv1d.
# Between them: more terms than stages, more tiles than programs, a group of rows of tiles that is
# not full, columns beyond the last.
FFNS = [
    (130, 264, 264, "gelu_tanh", False),
    (250, 72, 392, "silu", True),
    (1800, 8, 264, "relu", False),
]


# Of a product: rows, terms, columns, whether left and right are K-major, with a bias, terms that are
# added.
PRODUCT_SHAPES = [
    (130, 264, 264, True, True, True, 0),
    (250, 72, 392, False, False, False, 40),
    (1800, 8, 264, True, False, True, 8),
]
# Of ffn's backward: tokens, out_features, hidden, activation, whether gated.
DERIVATIVES = [
    (130, 264, 264, "gelu_tanh", False),
    (250, 72, 392, "silu", True),
    (1700, 8, 200, "relu", False),
]
# Of linear_cross_entropy: rows, features, classes, whether classes have weights, label smoothing, z_loss,
# scale and cap. The last has few classes, of which each one's share in the smoothing is seen.
LOSSES = [
    (130, 264, 264, False, 0.0, 0.0, 1.0, 0.0),
    (250, 72, 393, True, 0.2, 0.1, 0.5, 4.0),
    (1700, 8, 300, False, 0.3, 0.0, 1.0, 0.0),
    (70, 72, 25, True, 0.8, 0.0, 1.0, 0.0),
]
ACTIVATIONS = {
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def ordered(kernel: Any, args: Sequence[Any]) -> Sequence[str]:
    """The tensors that a launch adds to in an order: dQ, but where it has no semaphores."""
    given = dict(zip(kernel.arg_names, args))
    return ("dq_desc",) if given.get("semaphores") is not None else ()


@contextmanager
def emulated(**options: Any) -> Iterator[None]:
    """The `gluon` backend runs in the emulator; dQ must be added to in an order.

    New memory is filled with NaN: else a part of a result that nobody writes may be right by chance.
    Torch does so in its deterministic mode, of which the calls are not to know.
    """

    def launcher(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        launch(kernel, grid, *args, ordered=ordered(kernel, args), **options, **constants)

    kernels.use(launcher)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: False):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        kernels.use(None)


def draw(shape: tuple[Any, ...], seed: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors that a call differentiates, and the rest of its arguments."""
    torch.manual_seed(seed)
    batch, sq, sk, heads, kv_heads, d, dv, features = shape
    sizes = {"q": (sq, heads, d), "k": (sk, kv_heads, d), "v": (sk, kv_heads, dv)}
    tensors = {name: torch.randn(batch, n, h, w).half() for name, (n, h, w) in sizes.items()}
    given = dict(features)
    if given.pop("low", False):  # scores so low that exp(-lse) is infinite
        tensors["q"] += 4.0
        tensors["k"] -= 4.0
    if given.pop("sink", False):
        tensors["sink"] = torch.randn(heads).half()
    if "key_lengths" in given:
        given["key_lengths"] = torch.tensor(given["key_lengths"], dtype=torch.int32)
    if given.pop("alibi_slopes", False):
        given["alibi_slopes"] = torch.rand(heads)
    if "packed" in given:  # with tokens after the last sequence, NaN
        tensors = {name: x[0] for name, x in tensors.items()}
        lengths = torch.tensor([(0, 0), *given.pop("packed")], dtype=torch.int32)
        starts = lengths.cumsum(0, dtype=torch.int32).t().contiguous()
        given["cu_seqlens_q"], given["cu_seqlens_k"] = starts
        for name, x in tensors.items():
            x[starts[int(name != "q"), -1] :] = torch.nan
    return tensors, given


def run_forward(module: ModuleType, seed: int, **options: Any) -> None:
    """The forward of a module with the source of ops/attention/gluon/forward.py, by a seed."""
    tensors, given = draw(FORWARDS[seed % len(FORWARDS)], seed)
    with torch.no_grad(), mock.patch.object(room, "forward", module.forward):
        with emulated(seed=seed, **options):
            ours = _call(tensors, given, "gluon")
        eager, exact = (
            _call(tensors, given, "reference"),
            _call(_doubled(tensors), given, "reference"),
        )
    named = {name: (ours[i], eager[i], exact[i]) for i, name in enumerate(("out", "lse"))}
    assert_all_close_to_reference(named, ulps=16, **_factors(given))


def run_backward(module: ModuleType, seed: int, **options: Any) -> None:
    """The backward of a module with the source of ops/attention/gluon/backward.py, by a seed."""
    tensors, given = draw(BACKWARDS[seed % len(BACKWARDS)], seed)
    *lines, heads, _ = tensors["q"].shape
    dout = torch.randn(*lines, heads, tensors["v"].shape[-1]).half()
    dlse = torch.randn(*lines, heads).transpose(-2, -1)
    options = {"seed": seed, "resident": 1 + seed % 3, "in_order": True, **options}
    with mock.patch.object(room, "backward", module.backward), emulated(**options):
        ours = _gradients(tensors, given, "gluon", dout, dlse)
    eager = _gradients(tensors, given, "reference", dout, dlse)
    exact = _gradients(_doubled(tensors), given, "reference", dout.double(), dlse.double())
    named = {name: (ours[name], eager[name], exact[name]) for name in tensors}
    assert_all_close_to_reference(named, **_factors(given))


def run_ffn(module: ModuleType, seed: int, **options: Any) -> None:
    """The forward of a module with the source of ops/ffn/gluon/forward.py, and its pre."""
    tokens, features, hidden, activation, gated = FFNS[seed % len(FFNS)]
    torch.manual_seed(seed)
    x = torch.randn(tokens, features).half()
    w1, gate = ((torch.randn(hidden, features) / features**0.5).half() for _ in range(2))
    b1, gate_bias = torch.randn(2, hidden).half()
    gates = (gate, gate_bias) if gated else (None, None)
    identity = torch.eye(hidden).half()
    with emulated(seed=seed, **options):
        conv1d = seed % len(FFNS) == len(FFNS) - 1
        into, layout = (w1.t().contiguous(), "conv1d") if conv1d else (w1, "linear")
        out, pre = module.forward(x, into, b1, identity, None, *gates, activation, layout, True)
    activate = ACTIVATIONS[activation]

    def formula(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        y, w, b, g, h = (t.to(dtype) for t in (x, w1, b1, gate, gate_bias))
        up, gated_up = F.linear(y, w, b), F.linear(y, g, h)
        if gated:
            return activate(gated_up) * up, torch.stack([up, gated_up])
        return activate(up), up

    eager, exact = formula(torch.float16), formula(torch.float64)
    named = {
        name: (ours, eager[i], exact[i])
        for i, (name, ours) in enumerate((("out", out), ("pre", pre)))
    }
    assert_all_close_to_reference(named)


def run_product(module: ModuleType, seed: int, **options: Any) -> None:
    """A product by a module with the source of ops/common/gluon_products.py, by a seed."""
    shape = PRODUCT_SHAPES[seed % len(PRODUCT_SHAPES)]
    rows, terms, columns, left_lies, right_lies, biased, more = shape
    torch.manual_seed(seed)

    def matrix(height: int, width: int, by_rows: bool) -> torch.Tensor:
        return (
            torch.randn(height, width).half() if by_rows else torch.randn(width, height).half().t()
        )

    left, right = matrix(rows, terms, left_lies), matrix(terms, columns, not right_lies)
    pairs = [(left, right)]
    if more:
        pairs.append((matrix(rows, more, left_lies), matrix(more, columns, not right_lies)))
    bias = torch.randn(columns).half() if biased else None
    with emulated(seed=seed, **options):
        out = torch.empty(rows, columns, dtype=torch.float16)
        module.product(out, left, right, bias, pairs[1] if more else None)
    exact = sum((x.double() @ y.double() for x, y in pairs), torch.zeros(rows, columns))
    exact = exact if bias is None else exact + bias.double()
    assert_all_close_to_reference({"out": (out, exact.half(), exact)})


def run_derivative(module: ModuleType, seed: int, **options: Any) -> None:
    """The first kernel of a module with the source of ops/ffn/gluon/backward.py, by a seed."""
    tokens, features, hidden, activation, gated = DERIVATIVES[seed % len(DERIVATIVES)]
    torch.manual_seed(seed)
    dout = torch.randn(tokens, features).half()
    w2 = (torch.randn(hidden, features) / features**0.5).half()
    pre = torch.randn(*([2] if gated else []), tokens, hidden).half()
    with emulated(seed=seed, **options):
        found = module.derivative(dout, w2, pre, True, True, activation)
    activate = ACTIVATIONS[activation]

    def formula(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaf = pre.to(dtype).requires_grad_()
        activated = activate(leaf[1]) * leaf[0] if gated else activate(leaf)
        (dpre,) = torch.autograd.grad(activated, leaf, dout.to(dtype) @ w2.to(dtype).t())
        return activated.detach(), dpre, dpre.sum(-2)

    ours = (*found[:2], found[2].sum(-2))
    eager, exact = formula(torch.float16), formula(torch.float64)
    names = ("hidden", "dpre", "sums")
    assert_all_close_to_reference({n: x for n, *x in zip(names, ours, eager, exact)})


class Head:
    """A problem of linear_cross_entropy by a seed, and its formula."""

    def __init__(self, seed: int) -> None:
        rows, features, self.classes, weighted, *numbers = LOSSES[seed % len(LOSSES)]
        torch.manual_seed(seed)
        self.options = Options(IGNORED, *numbers, "none")
        self.x = torch.randn(rows, features).half()
        self.weight = (3 * torch.randn(self.classes, features) / features**0.5).half()
        self.bias = torch.randn(self.classes).half()
        self.targets = torch.randint(self.classes, (rows,))
        self.targets[torch.rand(rows) < 0.2] = IGNORED
        self.class_weight = torch.rand(self.classes) + 0.1 if weighted else None
        self.tensors = self.x, self.weight, self.bias, self.targets, self.class_weight
        self.factors = _factors({"softcap": 0} if self.options.softcap else {})

    def logits(self, dtype: torch.dtype) -> torch.Tensor:
        return F.linear(*(t.to(dtype) for t in (self.x, self.weight, self.bias)))

    def known(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Of each row: log of the sum of exponentials, the target's score, and smoothing's sum."""
        s = losses.scores(self.logits(dtype), self.options)
        lse = s.logsumexp(-1)
        picked = s.gather(1, self.targets.clamp(min=0)[:, None])[:, 0]
        w = torch.ones(self.classes) if self.class_weight is None else self.class_weight
        smooth = ((s - lse[:, None]) * w).sum(1)
        return {"lse": lse, "picked": picked * (self.targets >= 0), "smooth": smooth}

    def gradient(self, dlosses: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        leaf = self.logits(dtype).requires_grad_()
        found = losses.token_losses(leaf, self.targets, self.class_weight, self.options)
        return torch.autograd.grad(found, leaf, dlosses.to(found.dtype))[0]


def run_loss(module: ModuleType, seed: int, **options: Any) -> None:
    """The forward's kernel of a module with the source of ops/linear_cross_entropy/gluon/forward.py."""
    head = Head(seed)
    with emulated(seed=seed, **options):
        m, total, picked, *more = module.launch_forward(*head.tensors, head.options)
    top = m.amax(0)
    lse = top + (total * torch.exp(m - top)).sum(0).log()
    ours = {"lse": lse, "picked": picked.sum(0) * (head.targets >= 0)}
    if more:
        smooth, seen = more
        ours["smooth"] = (smooth + seen * (m - lse)).sum(0)
    eager, exact = head.known(torch.float16), head.known(torch.float64)
    named = {name: (x, eager[name], exact[name]) for name, x in ours.items()}
    assert_all_close_to_reference(named, **head.factors)


def run_loss_backward(module: ModuleType, seed: int, **options: Any) -> None:
    """The gradients of the logits, by a module with the source of .../gluon/backward.py."""
    head = Head(seed)
    dlosses = torch.randn(len(head.x))
    s = losses.scores(head.logits(torch.float64), head.options)
    m = s.amax(1)
    statistics = torch.stack([m, torch.exp(s - m[:, None]).sum(1)]).float()
    all_weight = None if head.class_weight is None else head.class_weight.sum()
    with emulated(seed=seed, **options):
        out = torch.empty(len(head.x), -(-head.classes // 8) * 8).half()[:, : head.classes]
        module.launch_gradient(out, dlosses, *head.tensors, all_weight, statistics, head.options)
    eager, exact = (head.gradient(dlosses, dtype) for dtype in (torch.float16, torch.float64))
    assert_all_close_to_reference({"dlogits": (out, eager, exact)}, **head.factors)


def _factors(given: dict[str, Any]) -> dict[str, float]:
    """Of the rule: a cap's tanh has an error of its own."""
    return {"max_factor": 3.0, "rms_factor": 2.0} if "softcap" in given else {}


def _call(tensors: dict[str, Any], given: dict[str, Any], backend: str) -> tuple[Any, Any]:
    call = fastattn.attention_varlen if "cu_seqlens_q" in given else fastattn.attention
    return call(**tensors, **given, return_lse=True, backend=backend)


def _doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in tensors.items()}


def _gradients(
    tensors: dict[str, torch.Tensor], given: dict[str, Any], backend: str, dout: Any, dlse: Any
) -> dict[str, torch.Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out, lse = _call(leaves, given, backend)
    seen = lse.isfinite()  # the LSE of a row that sees no key has no gradient
    found = torch.autograd.grad(
        (out, lse[seen]), list(leaves.values()), (dout, dlse[seen].to(lse.dtype))
    )
    return dict(zip(leaves, found))
