"""The rotary embedding of attentions of transformers, on `fastattn.rotary`."""

from __future__ import annotations

import copy
import functools
import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from integrations import tiny
from integrations.tiny import decoder, logits_and_gradients
from torch import Tensor
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

import fastattn
from fastattn.integrations import swap
from fastattn.integrations.hypotheses import rebinding
from fastattn.integrations.hypotheses import rotation as hypothesis
from oracle import assert_close_to_reference

DECODER = {k: v for k, v in tiny.DECODER.items() if k != "head_dim"} | {"initializer_range": 0.2}
WIDE = {**DECODER, "head_dim": 16}
NEOX = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}

# family -> (name of model and config, settings, interleaved)
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Llama": ("Llama", DECODER, False),
    "Qwen3, norms of heads": ("Qwen3", WIDE, False),
    "GPT-NeoX, partial": ("GPTNeoX", {**NEOX, "rotary_pct": 0.25, "hidden_size": 96}, False),
    "Cohere, interleaved": ("Cohere", DECODER, True),
    "GLM, interleaved, partial": ("Glm", WIDE, True),
    "Phi, partial": ("Phi", {**DECODER, "partial_rotary_factor": 0.5}, False),
    "Gemma 3, two thetas": ("Gemma3", WIDE, False),
    "StableLM, partial": ("StableLm", {**DECODER, "hidden_size": 96}, False),
}


def make(family: str) -> Any:
    name, settings, _ = FAMILIES[family]
    return decoder(name, settings)


def tokens() -> Tensor:
    return torch.randint(2, 97, (3, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[hypothesis.Rotation]:
    """The rotation of each call that ours has run."""
    seen: list[hypothesis.Rotation] = []
    call = hypothesis.Rotation.__call__

    def spy(self: hypothesis.Rotation, *args: Any, **norms: Any) -> Any:
        seen.append(self)
        return call(self, *args, **norms)

    monkeypatch.setattr(hypothesis.Rotation, "__call__", spy)
    return seen


def attentions(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(("self_attn", "attention"))]


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_before_and_after(family: str, calls: list[hypothesis.Rotation]) -> None:
    model = make(family)
    ids = tokens()[:, :7]
    eager = logits_and_gradients(model, tokens())
    exact = logits_and_gradients(model, tokens(), torch.float64)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    report = fastattn.accelerate(model)

    rotary = [entry for entry in report.swapped if "rotary" in str(entry.backend)]
    assert [entry.name for entry in rotary] == attentions(model)
    assert len(rotary) == 2
    calls.clear()
    ours = logits_and_gradients(model, tokens())
    assert len(calls) == 2
    assert all(rotation.interleaved is FAMILIES[family][2] for rotation in calls)
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert_close_to_reference(value, eager[name], exact[name], name=name)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), greedy)

    fastattn.restore(model)
    calls.clear()
    for name, value in logits_and_gradients(model, tokens()).items():
        assert torch.equal(value, eager[name]), name
    assert not calls


def test_small_calls_on_a_cpu_run_the_original(calls: list[hypothesis.Rotation]) -> None:
    model = make("Llama")
    before = model(tokens()).logits
    fastattn.accelerate(model)
    calls.clear()
    torch.testing.assert_close(model(tokens()).logits, before)
    assert not calls
    with fastattn.use_backend("reference"):  # a user who names a backend gets it
        model(tokens())
    assert len(calls) == 2


def test_the_report_and_verify_name_it() -> None:
    model = make("Llama")
    assert "torch, rotary torch" in str(fastattn.accelerate(model))
    assert "torch, rotary torch" in str(fastattn.verify(model))
    again = fastattn.accelerate(model)
    assert not again.swapped


def test_the_attention_follows_the_config() -> None:
    """As `AttentionSwap` has it: what the config says counts, and our rotation stays."""
    model = make("Llama")
    fastattn.accelerate(model)
    attention = model.model.layers[0].self_attn
    assert attention.config._attn_implementation == "fastattn"
    model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    model(tokens())


@pytest.mark.usefixtures("every_size")
def test_autocast_and_other_calls_run_the_original(calls: list[hypothesis.Rotation]) -> None:
    """Heads of 16 bits and angles of 32: the original's result has 32."""
    model = make("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        before = model(tokens()).logits
    fastattn.accelerate(model)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        after = model(tokens()).logits
    assert not calls
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("family", ("Llama", "GLM, interleaved, partial"))
def test_deep_copies_and_pickles(family: str, calls: list[hypothesis.Rotation]) -> None:
    model = make(family)
    fastattn.accelerate(model)
    expected = model(tokens()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        calls.clear()
        assert torch.equal(other(tokens()).logits, expected)
        assert len(calls) == 2
        fastattn.restore(other)
        calls.clear()
        other(tokens())
        assert not calls


@pytest.mark.usefixtures("every_size")
def test_compiled_in_one_graph() -> None:
    """The whole model, and an attention by itself, whose forward is the outermost frame."""
    model = make("Llama")
    before = model(tokens(), use_cache=False).logits
    fastattn.accelerate(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, before)
    assert counter.frame_count == 1

    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 5, 48)
    angles = torch.randn(2, 5, 8)
    given = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    expected, _ = attention(x, **given)
    torch._dynamo.reset()
    alone = torch.compile(attention, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(alone(x, **given)[0], expected)


def test_compiled_with_graph_breaks() -> None:
    """A frame of the attention's forward that torch.compile meets by itself."""
    model = make("Llama")
    del model.model.layers[1:]  # each is compiled in pieces of its own
    before = model(tokens(), use_cache=False).logits
    fastattn.accelerate(model)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        layer.self_attn.q_proj.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, before)


@pytest.mark.usefixtures("every_size")
def test_the_module_is_not_touched_and_seen_as_it_is(
    calls: list[hypothesis.Rotation], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    other, model = make("Llama"), make("Llama")
    fastattn.accelerate(model)
    assert modeling_llama.apply_rotary_pos_emb is original
    assert type(other.model.layers[0].self_attn) is modeling_llama.LlamaAttention
    calls.clear()
    other(tokens())
    assert not calls
    # A name that is set in the module later counts, as for the original.
    seen: list[str] = []
    forward = modeling_llama.eager_attention_forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append("eager")
        return forward(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", watched)
    model.set_attn_implementation("eager")
    model(tokens())
    assert len(seen) == 2


# --- what a function is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "interleaved", "angles", "partial"),
    [
        (modeling_llama.apply_rotary_pos_emb, False, "element", False),
        (modeling_gpt_neox.apply_rotary_pos_emb, False, "element", True),
        (modeling_cohere.apply_rotary_pos_emb, True, "element", False),
        (modeling_glm.apply_rotary_pos_emb, True, "first half", True),
    ],
)
def test_what_a_function_computes(
    function: Any, interleaved: bool, angles: str, partial: bool
) -> None:
    found = hypothesis.rotation_of("anything", function)
    assert found == hypothesis.Rotation("anything", interleaved, angles, partial)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotating(change: Callable[..., tuple[Tensor, Tensor]]) -> types.FunctionType:
    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        return change(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    assert isinstance(apply, types.FunctionType)
    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (turned(q, cos, -sin), turned(k, cos, -sin)),  # the other way
        lambda q, k, cos, sin: (turned(q, cos, sin), k),  # q alone
        lambda q, k, cos, sin: (turned(k, cos, sin), turned(q, cos, sin)),  # exchanged
        lambda q, k, cos, sin: (turned(q, cos, sin) * 1.01, turned(k, cos, sin)),  # scaled
        lambda q, k, cos, sin: (turned(q, cos, sin).float(), turned(k, cos, sin).float()),
        lambda q, k, cos, sin: (turned(q, sin, cos), turned(k, sin, cos)),  # exchanged
        lambda q, k, cos, sin: 1 / 0,
        lambda q, k, cos, sin: None,
    ],
)
def test_functions_that_are_no_rotation_of_ours(change: Any) -> None:
    assert hypothesis.rotation_of("apply_rotary_pos_emb", rotating(change)) is None


def apply_along(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of angles (seqlen, head_dim), the same in every row."""
    return turned(q, cos, sin), turned(k, cos, sin)


def apply_wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turned(q, cos, -sin), turned(k, cos, sin)


class Plain(torch.nn.Module):
    """Code that knows nothing of transformers, and calls torch's attention itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 16
        self.qkv, self.out = torch.nn.Linear(48, 144), torch.nn.Linear(48, 48)

    def heads(self, x: Tensor) -> Any:
        return self.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = apply_along(q, k, cos, sin)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Wrong(Plain):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = apply_wrong(q, k, cos, sin)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.usefixtures("every_size")
def test_a_forward_that_calls_the_attention_of_torch(calls: list[hypothesis.Rotation]) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 21, 48), torch.randn(21, 8)
    angles = torch.cat([angles, angles], -1)
    for cls, rotated in ((Plain, 1), (Wrong, 0)):
        module = cls()
        args = x, angles.cos(), angles.sin()
        before = module(*args)
        (entry,) = [e for e in fastattn.accelerate(module).swapped if e.name == ""]
        assert entry.backend == ("torch, rotary torch" if rotated else "torch")
        calls.clear()
        torch.testing.assert_close(module(*args), before)
        assert len(calls) == rotated
        with pytest.raises(RuntimeError):  # as the original, of other lengths
            module(x, angles[:5].cos(), angles[:5].sin())
        assert len(calls) == rotated
        fastattn.restore(module)
        assert torch.equal(module(*args), before)


def test_a_model_with_another_rotation_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name tells nothing: the attention is swapped, and turns as before."""
    wrong = rotating(lambda q, k, cos, sin: (turned(q, cos, -sin), turned(k, cos, -sin)))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", wrong)
    model = make("Llama")
    before = model(tokens()).logits
    report = fastattn.accelerate(model)
    backends = {entry.backend for entry in report.swapped if entry.name in attentions(model)}
    assert backends == {"torch"}
    torch.testing.assert_close(model(tokens()).logits, before)


def test_decorators_and_closures_stay() -> None:
    """What wraps the forward runs as before; a forward that cannot be reached is left."""
    model = make("Llama")
    attention = model.model.layers[0].self_attn
    fastattn.accelerate(model)
    ours, original = type(attention).forward, modeling_llama.LlamaAttention.forward
    assert ours.__code__ is original.__code__ and ours.__wrapped__.__code__ is original.__wrapped__.__code__  # fmt: skip
    assert ours.__wrapped__ is not original.__wrapped__
    assert original.__wrapped__.__globals__ is vars(modeling_llama)
    assert isinstance(attention, modeling_llama.LlamaAttention)
    assert swap.Swapped in type(attention).__mro__

    def hidden(self: Any) -> None: ...

    outer = functools.wraps(original)(hidden)  # keeps the original nowhere that can be changed
    assert rebinding.innermost(outer) is None
