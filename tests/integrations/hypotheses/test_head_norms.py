"""Norms of the heads of q and k, which leave themselves to the rotation after them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from integrations import tiny
from integrations.tiny import decoder, logits_and_gradients
from torch import Tensor

import fastattn
from fastattn.integrations.hypotheses import deferred_norm, rotation
from fastattn.integrations.hypotheses.norm import Norm
from oracle import assert_close_to_reference

SETTINGS = {**tiny.DECODER, "head_dim": 16, "initializer_range": 0.2}


def make(family: str) -> Any:
    model = decoder(family, SETTINGS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # far from norms that do nothing
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def normed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The norms among the arguments of each call of `rotary`."""
    seen: list[list[str]] = []
    original = rotation.rotary

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append([name for name in ("q_weight", "k_weight") if kwargs.get(name) is not None])
        return original(*args, **kwargs)

    monkeypatch.setattr(rotation, "rotary", spy)
    return seen


IDS = tiny.tokens(3, 21)
BOTH = ["q_weight", "k_weight"]


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Qwen3", BOTH),  # the weight as it is
        ("Gemma3", BOTH),  # 1 + weight
        ("Exaone4", BOTH),
        ("Olmo2", []),  # over all heads together: no norm of `rotary`
    ],
)
def test_a_model_before_and_after(
    family: str, expected: list[str], normed: list[list[str]]
) -> None:
    model = make(family)
    eager, exact = logits_and_gradients(model, IDS), logits_and_gradients(model, IDS, torch.float64)
    ids = tiny.tokens(2, 7)
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False)
    report = fastattn.accelerate(model)
    fused = [e.name for e in report.swapped if "norms of heads with rotary" in str(e.backend)]
    assert len(fused) == (2 if expected else 0)
    normed.clear()
    ours = logits_and_gradients(model, IDS)
    assert normed == [expected] * 2
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert_close_to_reference(value, eager[name], exact[name], name=name)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), greedy)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        normed.clear()
        torch.testing.assert_close(logits_and_gradients(other, IDS)["logits"], ours["logits"])
        assert normed == [expected] * 2
    fastattn.restore(model)
    assert torch.equal(logits_and_gradients(model, IDS)["logits"], eager["logits"])


@pytest.mark.usefixtures("every_size")
def test_a_norm_that_has_to_be_called_is(normed: list[list[str]]) -> None:
    model = make("Qwen3")
    fastattn.accelerate(model)
    expected = logits_and_gradients(model, IDS)["logits"]
    attention = model.model.layers[0].self_attn
    seen: list[Tensor] = []
    handle = attention.q_norm.register_forward_hook(lambda _, args, out: seen.append(out))
    normed.clear()
    torch.testing.assert_close(model(tiny.tokens(3, 21)).logits, expected)
    assert normed == [["k_weight"], BOTH]
    assert len(seen) == 1
    assert type(seen[0]) is Tensor
    handle.remove()
    torch.nn.init.constant_(attention.k_norm.weight, 0.5)  # a weight is read at each call
    eager = copy.deepcopy(model)
    fastattn.restore(eager)
    torch.testing.assert_close(
        logits_and_gradients(model, IDS)["logits"], logits_and_gradients(eager, IDS)["logits"]
    )
    attention.k_norm.variance_epsilon = 0.3  # no longer that of q
    eager.model.layers[0].self_attn.k_norm.variance_epsilon = 0.3
    normed.clear()
    torch.testing.assert_close(
        logits_and_gradients(model, IDS)["logits"], logits_and_gradients(eager, IDS)["logits"]
    )
    assert normed == [["q_weight"], BOTH]


def test_small_calls_on_a_cpu_norm_as_before(normed: list[list[str]]) -> None:
    model = make("Qwen3")
    before = logits_and_gradients(model, IDS)["logits"]
    fastattn.accelerate(model)
    normed.clear()
    torch.testing.assert_close(logits_and_gradients(model, IDS)["logits"], before)
    assert not normed


@pytest.mark.usefixtures("every_size")
def test_excluded_norms_stay(normed: list[list[str]]) -> None:
    model = make("Qwen3")
    before = logits_and_gradients(model, IDS)["logits"]
    report = fastattn.accelerate(model, exclude=["*.q_norm"])
    backends = {e.backend for e in report.swapped if e.name.endswith("self_attn")}
    assert backends == {"torch, rotary torch"}
    normed.clear()
    torch.testing.assert_close(logits_and_gradients(model, IDS)["logits"], before)
    assert normed == [[], []]
    assert type(model.model.layers[0].self_attn.q_norm).__name__ == "Qwen3RMSNorm"


def test_a_fusion_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's calls are small, and run ours nonetheless."""
    original = rotation.rotary

    def wrong(*args: Any, q_weight: Any = None, k_weight: Any = None, **kwargs: Any) -> Any:
        eps, offset = kwargs.pop("eps", 0.0), kwargs.pop("weight_offset", 0.0)
        norms = {"q_weight": q_weight, "k_weight": q_weight, "eps": eps, "weight_offset": offset}
        return original(*args, **kwargs, **(norms if q_weight is not None else {}))

    monkeypatch.setattr(rotation, "rotary", wrong)
    report = fastattn.accelerate(make("Qwen3"))
    backends = {e.backend for e in report.swapped if e.name.endswith("self_attn")}
    assert backends == {"torch, rotary torch"}


class AfterRotation(transformers.models.qwen3.modeling_qwen3.Qwen3Attention):
    """Norms the values, of all things, which are not rotated."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, cache: Any = None, **kwargs: Any) -> Any:  # fmt: skip
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.k_norm(self.v_proj(hidden_states).view(shape)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, _ = attend(self, self.q_norm(q), k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


apply_rotary_pos_emb = transformers.models.qwen3.modeling_qwen3.apply_rotary_pos_emb
ALL_ATTENTION_FUNCTIONS = transformers.AttentionInterface()


@pytest.mark.usefixtures("every_size")
def test_norms_of_something_else_are_not_fused(normed: list[list[str]]) -> None:
    model = make("Qwen3")
    for layer in model.model.layers:
        layer.self_attn.__class__ = AfterRotation
    before = logits_and_gradients(model, IDS)["logits"]
    report = fastattn.accelerate(model)
    backends = {e.backend for e in report.swapped if e.name.endswith("self_attn")}
    assert backends == {"torch, rotary torch"}
    torch.testing.assert_close(logits_and_gradients(model, IDS)["logits"], before)
    assert not any(normed)


# --- the tensor that remembers its norm -----------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * 2.0,
        lambda x: torch.cat([x, x], 1),
        lambda x: x.transpose(2, 3) @ x,  # the last dimension is the norm's
        lambda x: x.transpose(1, 2).reshape(2, -1),
        lambda x: x.transpose(-2, 1)[..., :3],
        lambda x: x.mul_(2.0) + x,
        lambda x: (x + 0, x.transpose(1, 2))[1],  # read before
        lambda x: torch.stack(list(x)),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    ],
    ids=["times", "cat", "last", "reshape", "negative", "in place", "read", "iter", "attention"],
)
def test_any_other_use_takes_the_norm_first(use: Any) -> None:
    heads = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    module = torch.nn.RMSNorm(8, eps=1e-6).double()
    torch.nn.init.normal_(module.weight)
    deferred = deferred_norm.later(
        Norm(False, "weight", None, 0, "eps"), torch.nn.RMSNorm, module, heads
    )
    assert isinstance(deferred, deferred_norm.DeferredNorm)
    assert deferred.shape == heads.shape
    assert deferred.dtype is heads.dtype
    found, expected = use(deferred), use(module(heads))
    assert type(found) is Tensor or not isinstance(deferred_norm.read(found), type(deferred))
    found = deferred_norm.read(found)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.sum(), (heads, module.weight))
    theirs = torch.autograd.grad(expected.sum(), (heads, module.weight))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.long
def test_a_compiled_model_leaves_the_norms_where_they_are() -> None:
    model = make("Qwen3")
    expected = model(tiny.tokens(2, 9), use_cache=False).logits
    fastattn.accelerate(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tiny.tokens(2, 9), use_cache=False).logits, expected)
