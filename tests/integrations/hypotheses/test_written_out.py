"""Attention that a module writes out by products."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.integrations.hypotheses import watching, written_out
from oracle import assert_close_to_reference

C, HEADS = 48, 3
HEAD_DIM = C // HEADS


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], -1)


class Joint(nn.Module):
    """nanoGPT's slow path."""

    def __init__(self, block_size: int = 41, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.n_head, self.n_embd = HEADS, C
        ones = torch.tril(torch.ones(block_size, block_size))
        self.register_buffer("bias", ones.view(1, 1, block_size, block_size))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = (split(y, self.n_head) for y in self.c_attn(x).split(self.n_embd, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return self.resid_dropout(self.c_proj(merged(att @ v)))


class ByHead(nn.Module):
    """One layer, with q, k and v of each head together; a scale that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.heads = 0.21, HEADS
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.proj(merged((self.scale * q @ k.mT).softmax(-1) @ v))


class Grouped(nn.Module):
    """Fewer heads of k and v; causal by the code alone; layers in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        self.wo, self.wv, self.wk, self.wq = (
            nn.Linear(*each, bias=False) for each in ((C, C), (C, HEAD_DIM), (C, HEAD_DIM), (C, C))
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = split(self.wq(x)), split(self.wk(x), 1), split(self.wv(x), 1)
        k, v = k.repeat_interleave(HEADS, 1), v.repeat_interleave(HEADS, 1)
        scores = q @ k.mT / math.sqrt(self.head_dim)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        if mask is not None:
            scores = scores + mask
        return self.wo(merged(torch.softmax(scores.float().to(q.dtype), -1) @ v))


class Annotated(nn.Module):
    """The Annotated Transformer's: three inputs, layers in a list, masks of three dimensions."""

    def __init__(self, fill: float = -1e9, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_k, self.h, self.fill = HEAD_DIM, HEADS, fill
        self.linears = nn.ModuleList([nn.Linear(C, C, bias=i != 1) for i in range(4)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:  # fmt: skip
        if mask is not None:
            mask = mask.unsqueeze(1)
        q, k, v = (split(f(x)) for f, x in zip(self.linears, (query, key, value), strict=False))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, self.fill)
        return self.linears[-1](merged(self.dropout(scores.softmax(dim=-1)) @ v))


class Padded(nn.Module):
    """A mask of the keys, True where one is padding."""

    def __init__(self, k_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_lin, self.v_lin, self.out_lin = (nn.Linear(C, C) for _ in range(3))
        self.k_lin = nn.Linear(C, C, bias=k_bias)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        q, k, v = (split(f(x), self.num_heads) for f in (self.q_lin, self.k_lin, self.v_lin))
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask[:, None, None, :], float("-inf"))
        return self.out_lin(merged(scores.softmax(-1) @ v))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def coin(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.6


X = draw(2, 19, C)
SEEN = coin(2, 19, 19) | torch.eye(19, dtype=torch.bool)
SEEN[1, 3] = False
PADDING = coin(2, 19)
PADDING[:, 0] = False
# name -> (module, calls on ours, calls on the original)
CASES: dict[str, tuple[Any, list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]] = {
    "joint": (Joint, [(X,), (X[:, :7],)], []),
    "by head": (ByHead, [(X,)], []),
    "grouped": (Grouped, [(X,), (X, draw(19, 19)), (X, draw(2, 1, 1, 19))], [(X, draw(19))]),
    "annotated": (
        Annotated,
        [(X, draw(2, 11, C), draw(2, 11, C)), (X, X, X, SEEN), (X, X, X, SEEN[:, :1])],
        [(X, X, X, SEEN.long())],
    ),
    "annotated, -inf": (lambda: Annotated(-math.inf), [(X, X, X, SEEN | SEEN.mT)], []),
    "padded": (Padded, [(X,), (X, PADDING)], []),
}


def make(module: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = module()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each attention that ours has computed."""
    seen: list[Any] = []
    original = written_out.Written.attended

    def spy(*args: Any) -> Tensor | None:
        if (out := original(*args)) is not None:
            seen.append(out)
        return out

    monkeypatch.setattr(written_out.Written, "attended", spy)
    return seen


def swapped(module: nn.Module) -> bool:
    report = fastattn.accelerate(module)
    return "" in [entry.name for entry in report.swapped]


def run(module: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    dtype = next(module.parameters()).dtype
    leaves: dict[int, Tensor] = {}
    for x in args:
        if x.is_floating_point():
            leaves.setdefault(id(x), x.to(dtype, copy=True).requires_grad_())
    out = module(*(leaves.get(id(x), x) for x in args))
    sources = [*leaves.values(), *module.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), sources)]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, calls: list[Any]) -> None:
    cls, ours, theirs = CASES[case]
    module = make(cls)
    exact_one = copy.deepcopy(module).double()
    eager = [run(module, args) for args in (*ours, *theirs)]
    exact = [run(exact_one, args) for args in (*ours, *theirs)]
    assert swapped(module)
    for i, args in enumerate((*ours, *theirs)):
        calls.clear()
        with fastattn.use_backend("reference"):  # PyTorch's kernel for a CPU is less exact
            found = run(module, args)
        assert len(calls) == (1 if i < len(ours) else 0)
        for one, other in zip(run(module, args), eager[i], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        for name, (one, other, expected) in enumerate(zip(found, eager[i], exact[i], strict=True)):
            assert_close_to_reference(one, other, expected, name=f"call {i}, tensor {name}")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(*ours[0]), module(*ours[0]))
    fastattn.restore(module)
    for args, before in zip(ours, eager, strict=False):
        assert torch.equal(module(*args), before[0])


def test_a_bias_of_k_whose_gradient_is_noise() -> None:
    module = make(lambda: Padded(k_bias=True))
    before = module(X, PADDING)
    with fastattn.use_backend("reference"):
        assert swapped(module)
    torch.testing.assert_close(module(X, PADDING), before)


def test_keywords_and_other_forms(calls: list[Any]) -> None:
    module = make(Annotated)
    expected = module(X, X, X, mask=SEEN)
    by_name = module(query=X, key=X, value=X)
    assert swapped(module)
    calls.clear()
    torch.testing.assert_close(module(X, X, X, mask=SEEN), expected)
    assert len(calls) == 1
    assert torch.equal(module(query=X, key=X, value=X), by_name)
    assert len(calls) == 1
    with pytest.raises(TypeError):
        module(X, X)


def test_beyond_the_buffer_of_the_mask_it_fails_as_before() -> None:
    module = make(lambda: Joint(block_size=12))
    assert swapped(module)
    torch.testing.assert_close(module(X[:, :12]), fastattn_free(module)(X[:, :12]))
    with pytest.raises(RuntimeError, match="size of tensor"):
        module(X)


def fastattn_free(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    fastattn.restore(other)
    return other


@pytest.mark.parametrize("cls", [Joint, Annotated])
def test_dropout_in_training_runs_the_original(cls: Any, calls: list[Any]) -> None:
    module = make(lambda: cls(dropout=0.3)).train()
    args = (X,) * (3 if cls is Annotated else 1)
    torch.manual_seed(1)
    expected = module(*args)
    assert swapped(module)
    calls.clear()
    torch.manual_seed(1)
    assert torch.equal(module(*args), expected)
    assert not calls
    module.eval()(*args)
    assert len(calls) == 1


def test_layers_are_called_with_their_hooks() -> None:
    module: Any = make(Joint)
    before = module(X)
    assert swapped(module)
    seen: list[Any] = []
    module.c_attn.register_forward_hook(lambda _, args, out: seen.append(1))
    module.c_proj.register_forward_hook(lambda _, args, out: out + 1.0)
    torch.testing.assert_close(module(X), before + 1.0)
    assert seen == [1]


class Other(Joint):
    """Some step of `Joint` is another."""

    step = ""

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = (split(y, self.n_head) for y in self.c_attn(x).split(self.n_embd, dim=2))
        if self.step == "normed":
            q = F.normalize(q, dim=-1)
        att = q @ k.mT / math.sqrt(HEAD_DIM)
        if self.step == "bias":
            att = att - 0.1 * torch.arange(T, dtype=x.dtype)
        if self.step == "window":
            att = att.masked_fill(torch.ones(T, T, dtype=torch.bool).tril(-3), float("-inf"))
        if self.step == "window beyond the run":
            att = att.masked_fill(torch.ones(T, T, dtype=torch.bool).tril(-9), float("-inf"))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        weights = att.sigmoid() if self.step == "sigmoid" else att.softmax(-1)
        y = merged(weights @ v)
        if self.step == "gate":
            y = y * x
        y = self.c_proj(y)
        return y + x if self.step == "residual" else y


STEPS = "normed", "bias", "window", "window beyond the run", "sigmoid", "gate", "residual"


@pytest.mark.parametrize("step", STEPS)
def test_other_formulas_are_left(step: str) -> None:
    module: Any = make(Other)
    module.step = step
    before = module(X)
    assert not swapped(module)
    assert torch.equal(module(X), before)


def test_a_buffer_that_is_not_causal_beyond_the_run_is_refused() -> None:
    module: Any = make(Joint)
    module.bias[..., 30, 2] = 0.0
    assert not swapped(module)


def test_looking_changes_nothing() -> None:
    module = make(lambda: Joint(dropout=0.5)).train()
    state, rng = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert [*watching.of(module)]
    assert torch.equal(torch.get_rng_state(), rng)
    assert module.training
    assert not module.c_attn._forward_hooks  # type: ignore[union-attr]
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])


def test_in_a_model_with_its_mlp_and_norms() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), Joint(), nn.LayerNorm(C)
            self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    model = make(lambda: nn.Sequential(Block(), Block()))
    before = model(X)
    report = fastattn.accelerate(model)
    classes = [entry.class_name for entry in report.swapped]
    assert classes.count("Joint") == 2
    assert classes.count("Sequential") == 2
    assert not [e for e in report.left if e.class_name == "Joint"]
    torch.testing.assert_close(model(X), before)
    fastattn.verify(model, X)


@pytest.mark.long
def test_compiled() -> None:
    for cls, args in ((Joint, (X,)), (Annotated, (X, X, X, SEEN))):
        module = make(cls)
        expected = module(*args)
        assert swapped(module)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), expected)
