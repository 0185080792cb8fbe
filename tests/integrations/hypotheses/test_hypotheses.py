"""Modules of classes that fastattn has never seen: swapped where they are what they look like."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from integrations.tiny import HIDDEN, fresh
from torch import Tensor, nn

import fastattn
from fastattn.integrations import swap


class Norm(nn.Module):
    """A norm as models write it out: `formula` is given x, the weight, the bias and eps."""

    def __init__(
        self, formula: Callable[..., Tensor], bias: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN))
        self.shift = nn.Parameter(torch.randn(HIDDEN)) if bias else None
        self.smallest = eps
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.w, self.shift, self.smallest)


def rms(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    y = x.float() if x.dtype != torch.float64 else x
    return w * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_of_one_more(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    y = x.float() if x.dtype != torch.float64 else x
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * (1.0 + w.to(y))).to(x.dtype)


def by_hand(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * w + (0 if b is None else b)


def of_torch(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, (HIDDEN,), w, b, eps)


NORMS = {
    "RMSNorm": Norm(rms),
    "RMSNorm, small eps": Norm(rms, eps=1e-12),
    "RMSNorm, 1 + weight": Norm(rms_of_one_more),
    "LayerNorm, by hand": Norm(by_hand, bias=True),
    "LayerNorm, no bias": Norm(of_torch),
    "LayerNorm, eps in the code": Norm(lambda x, w, b, eps: of_torch(x, w, b, 1e-6), True, eps=1.0),
}

# Each like a norm, and none.
NOT_NORMS = {
    "unbiased deviation": Norm(lambda x, w, b, eps: w * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + eps)),
    "eps outside the root": Norm(lambda x, w, b, eps: w * x / (x.square().mean(-1, True).sqrt() + eps)),
    "sum, not mean": Norm(lambda x, w, b, eps: w * x / (x.square().sum(-1, True) + eps).sqrt()),
    "another dimension": Norm(lambda x, w, b, eps: w * x / (x.square().mean(-2, True) + eps).sqrt()),
    "2 + weight": Norm(lambda x, w, b, eps: rms(x, 2 + w, b, eps)),
    "clamped": Norm(lambda x, w, b, eps: rms(x.clamp(-3, 3), w, b, eps)),
    "only a product": Norm(lambda x, w, b, eps: w * x),
    "an eps that is not kept": Norm(lambda x, w, b, eps: rms(x, w, b, 3e-4), eps=1.0),
}  # fmt: skip


class MLP(nn.Module):
    def __init__(
        self, act: object, *, bias: bool = True, inside: float = 0.0, outside: float = 0.0
    ) -> None:
        super().__init__()
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias)  # in an order that tells nothing
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias)
        self.activation_fn = act
        if inside:
            self.inner = nn.Dropout(inside)
        if outside:
            self.outer = nn.Dropout(outside)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation_fn(self.up(x))
        h = self.inner(h) if hasattr(self, "inner") else h
        h = self.down(h)
        return self.outer(h) if hasattr(self, "outer") else h


class FunctionalMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


MLPS = {
    "module": MLP(nn.GELU()),
    "function": MLP(F.relu, bias=False),
    "tanh": MLP(nn.GELU(approximate="tanh")),
    "dropout inside": MLP(nn.SiLU(), inside=0.5),
    "dropout outside": MLP(nn.SiLU(), outside=0.5),
    "both": MLP(nn.ReLU(), inside=0.1, outside=0.5),
    "activation in the code": FunctionalMLP(),
    "sequential": nn.Sequential(
        nn.Linear(HIDDEN, 40), nn.GELU(), nn.Linear(40, 7), nn.Dropout(0.1)
    ),
}


class Gated(nn.Module):
    """As Llama has it, or T5, with a dropout inside."""

    def __init__(
        self, act: object, *, bias: bool = False, inside: float = 0.0, first: bool = True,
        hidden: int = 40,
    ) -> None:  # fmt: skip
        super().__init__()
        self.a, self.b = nn.Linear(HIDDEN, hidden, bias), nn.Linear(HIDDEN, hidden, bias)
        self.act, self.gate_first = act, first
        self.inner = nn.Dropout(inside)
        self.out = nn.Linear(hidden, HIDDEN, bias)

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.out(self.inner(self.product(a, b) if self.gate_first else self.product(b, a)))


class Joint(nn.Module):
    """As Phi3 or ModernBERT has it: one layer for the gate and what it gates."""

    def __init__(
        self, act: object, *, bias: bool = False, first: bool = True, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.down, self.gate_up = nn.Linear(40, HIDDEN, bias), nn.Linear(HIDDEN, 80, bias)
        self.act, self.gate_first, self.interleaved = act, first, interleaved

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        a, b = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        gate, up = (a, b) if self.gate_first else (b, a)
        return self.down(up * self.act(gate))


class Conv1DGated(nn.Module):
    """Of GPT-2's layers, whose weights lie the other way."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.first = Conv1D(80 if joint else 40, HIDDEN)
        if not joint:
            self.second = Conv1D(40, HIDDEN)
        self.last, self.joint = Conv1D(HIDDEN, 40), joint

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, -1) if self.joint else (self.first(x), self.second(x))
        return self.last(F.silu(a) * b)


GATED = {
    "gated": Gated(nn.SiLU()),
    "gated, gate last": Gated(F.gelu, first=False, bias=True),
    "gated, all sizes equal": Gated(nn.ReLU(), first=False, hidden=HIDDEN),
    "gated, dropout inside": Gated(nn.GELU(approximate="tanh"), inside=0.5),
    "joint": Joint(nn.SiLU()),
    "joint, gate last": Joint(nn.GELU(), bias=True, first=False),
    "joint, interleaved": Joint(F.silu, bias=True, interleaved=True),
    "joint, interleaved, gate last": Joint(F.relu, first=False, interleaved=True),
}


class Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Maximum(Joint):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate_up(x).unflatten(-1, (2, -1)).amax(-2)))


def product(function: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A gated MLP with something else for the product."""
    return type("Other", (Gated,), {"product": lambda self, gate, up: function(gate, up)})(F.silu)


NOT_MLPS = {
    "another activation": MLP(nn.Mish()),
    "cut off": MLP(nn.ReLU6()),
    "twice": Twice(F.gelu),
    "gated, another activation": Gated(torch.tanh),
    "gated, both activated": product(lambda gate, up: F.silu(gate) * F.silu(up)),
    "gated, clamped": product(lambda gate, up: F.silu(gate) * up.clamp(-7, 7)),
    "gated, one more": product(lambda gate, up: F.silu(gate) * (up + 1)),
    "a sum, no product": product(lambda gate, up: F.silu(gate) + up),
    "joint, but a maximum": Maximum(F.silu),
}


class Attention(nn.Module):
    """As nanoGPT has it."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.heads, self.dropout = heads, 0.3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1)
        )
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.c_proj(y.transpose(1, 2).flatten(2))


SWAPPED = {**NORMS, **MLPS, **GATED, "attention": Attention()}


@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_and_equal(name: str, device: str, x: Tensor) -> None:
    ours, theirs = fresh(SWAPPED[name], device), fresh(SWAPPED[name], device)
    report = fastattn.accelerate(ours)
    assert report.swapped and report.swapped[0].name == "", report
    assert isinstance(ours, type(theirs))
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad)
    # In training: the same numbers dropped, where the original runs or drops the output.
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(0)
        model.seen = model(x)
    assert name == "attention" or torch.allclose(ours.seen, theirs.seen, atol=1e-5)
    fastattn.verify(ours)
    fastattn.restore(ours)
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("name", {**NOT_NORMS, **NOT_MLPS})
def test_left_alone(name: str, device: str) -> None:
    module = fresh({**NOT_NORMS, **NOT_MLPS}[name], device)
    report = fastattn.accelerate(module)
    assert type(module) is type({**NOT_NORMS, **NOT_MLPS}[name])
    assert report.swapped == () and report.left[0].reason != swap.ALREADY


def test_the_nearest_miss_is_named(device: str) -> None:
    (entry,) = fastattn.accelerate(fresh(NOT_NORMS["2 + weight"], device)).left
    assert entry.reason is not None and entry.reason.startswith("no RMSNorm with weight 1 + w: ")
    mish = fastattn.accelerate(fresh(NOT_MLPS["another activation"], device)).left[0]
    assert "its activation Mish is none of ['gelu', 'gelu_tanh'" in str(mish.reason)


@pytest.mark.parametrize("joint", (False, True))
def test_gated_mlps_of_conv1d(joint: bool, device: str, x: Tensor) -> None:
    pytest.importorskip("transformers")
    ours = fresh(Conv1DGated(joint), device)
    theirs = copy.deepcopy(ours)
    assert fastattn.accelerate(ours).swapped
    torch.testing.assert_close(ours(x), theirs(x))


def test_q_k_and_v_are_taken_for_no_mlp() -> None:
    """Three equal layers and no activation: the report would name an MLP that nobody wrote."""
    from fastattn.integrations.hypotheses import feed_forward

    module = nn.Module()
    module.q, module.k, module.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
    assert not list(feed_forward.of(module))


def test_a_joint_weight_is_not_copied(
    device: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.integrations.hypotheses import feed_forward

    ours, given = fresh(GATED["joint"], device), {}
    fastattn.accelerate(ours)
    run = feed_forward.ffn
    monkeypatch.setattr(feed_forward, "ffn", lambda **kw: given.update(kw) or run(**kw))
    ours(x)
    storage = ours.gate_up.weight.untyped_storage().data_ptr()
    assert all(given[name].untyped_storage().data_ptr() == storage for name in ("gate", "w1"))


@pytest.mark.parametrize(
    "name", ("RMSNorm, 1 + weight", "dropout outside", "gated", "joint, gate last", "attention")
)
def test_copies_and_compiles(name: str, device: str, x: Tensor) -> None:
    if name == "RMSNorm, 1 + weight":
        model: nn.Module = fresh(SWAPPED[name], device)
        model.formula = rms_of_one_more  # a name, for the pickle
    else:
        model = fresh(SWAPPED[name], device)
    expected = model(x)
    fastattn.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), compiled):
        torch.testing.assert_close(other(x), expected)
    assert fastattn.accelerate(copy.deepcopy(model)).swapped == ()


def test_other_calls_run_the_original(device: str, x: Tensor) -> None:
    class Gated(Norm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x if gate is None else x * gate)

    model = Gated(rms).to(device)
    plain = copy.deepcopy(model)
    assert fastattn.accelerate(model).swapped
    torch.testing.assert_close(model(x, x), plain(x, x))
    torch.testing.assert_close(model(x, gate=x), plain(x, gate=x))
    torch.testing.assert_close(model(x=x), plain(x=x))
    # Another dtype than the weight's: the original decides in which it answers.
    assert model(x.bfloat16()).dtype == plain(x.bfloat16()).dtype


def test_parts_that_must_be_called(device: str, x: Tensor) -> None:
    model, calls = fresh(MLPS["module"], device), []
    fastattn.accelerate(model)
    model.up.register_forward_hook(lambda *_: calls.append("up"))
    model(x)
    assert calls == ["up"]
    (entry,) = (e for e in fastattn.verify(model).left if e.name == "")
    assert "up is a Linear that must be called itself" in str(entry.reason)
    gated, calls = fresh(GATED["gated"], device), []
    fastattn.accelerate(gated)
    gated.a.register_forward_hook(lambda *_: calls.append("a"))
    gated(x)
    assert calls == ["a"]
    model = fresh(MLPS["module"], device)
    fastattn.accelerate(model)
    model.activation_fn = nn.Tanh()
    expected = model.down(torch.tanh(model.up(x)))
    torch.testing.assert_close(model(x), expected)


def test_torch_is_not_touched(device: str, x: Tensor) -> None:
    original = F.scaled_dot_product_attention
    model, other = Attention().to(device), Attention().to(device)
    fastattn.accelerate(model)
    assert F.scaled_dot_product_attention is original
    assert type(other).forward.__globals__ is globals()
    assert globals()["torch"] is torch


class Processor:
    """As diffusers keeps one: attention whose arithmetic is an object's, to be exchanged."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, attention: nn.Module, x: Tensor) -> Tensor:
        self.seen += 1
        q, k, v = (
            y.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for y in attention.c_attn(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attention.c_proj(y.transpose(1, 2).flatten(2))


class OtherProcessor(Processor):
    def __call__(self, attention: nn.Module, x: Tensor) -> Tensor:
        return attention.c_proj(x)


class Processed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def test_attention_of_an_object(device: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fresh(Processed(), device)
    theirs, processor = copy.deepcopy(ours), ours.processor
    assert fastattn.accelerate(ours).swapped
    assert ours.processor is processor
    for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with monkeypatch.context() as patched:  # torch's own is not asked
            patched.setattr(F, "scaled_dot_product_attention", None)
            found = other(x)
        torch.testing.assert_close(found, theirs(x))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x))
    seen = processor.seen
    ours(x)
    assert processor.seen == seen + 1  # it keeps its state
    for model in (ours, theirs):
        model.processor = OtherProcessor()
    torch.testing.assert_close(ours(x), theirs(x))
