"""GPT's logits, loss and gradients against transformers' GPT-2, and its errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

from fastattn import GPT, GPTConfig
from fastattn.models import KVCache

NESTED = torch.nested.nested_tensor([torch.ones(n).long() for n in (2, 3)], layout=torch.jagged)
Pair = tuple[GPT, transformers.GPT2LMHeadModel]
MakePair = Callable[..., Pair]


def _tokens(pair: Pair, batch: int = 2, seqlen: int = 33) -> torch.Tensor:
    return torch.randint(0, pair[0].config.vocab_size, (batch, seqlen), device=pair[0].device)


def test_loss_is_transformers_loss(pair: Pair) -> None:
    ours, theirs = pair
    tokens = _tokens(pair)
    _, loss = ours(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss, atol=1e-5, rtol=0)


def test_logits_to_keep(pair: Pair) -> None:
    ours, _ = pair
    tokens = _tokens(pair)
    torch.testing.assert_close(ours(tokens, logits_to_keep=3), ours(tokens)[:, -3:])


def test_int32_tokens(pair: Pair) -> None:
    ours, _ = pair
    tokens = _tokens(pair)
    logits, loss = ours(tokens.int(), tokens.int())
    expected, expected_loss = ours(tokens, tokens)
    assert torch.equal(logits, expected) and torch.equal(loss, expected_loss)


def test_dropout_acts_in_training_alone(small: dict[str, Any]) -> None:
    tokens = torch.randint(0, 97, (1, 5))
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        model = GPT(GPTConfig(**{**small, name: 0.5}))
        assert not torch.equal(model(tokens), model(tokens)), name
        model.eval()
        assert torch.equal(model(tokens), model(tokens)), name


def _losses(model: GPT, steps: int) -> list[float]:
    """Of steps on the same tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens, losses = torch.randint(0, 97, (4, 17)), []
    for _ in range(steps):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_lowers_the_loss(small: dict[str, Any]) -> None:
    losses = _losses(GPT(GPTConfig(**{**small, "initializer_range": 0.02})), 60)
    assert losses[0] == pytest.approx(4.57, abs=0.2)  # log 97: knows nothing
    assert losses[-1] < 0.5


def test_compiles_whole(small: dict[str, Any], device: str) -> None:
    model = GPT(GPTConfig(**small), device=device).eval()
    tokens = torch.randint(0, 97, (2, 9), device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, loss = compiled(tokens, tokens)
    expected, expected_loss = model(tokens, tokens)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, expected_loss)


@pytest.mark.parametrize("grad", [False, True])
def test_cache_in_parts_equals_the_whole(pair: Pair, grad: bool) -> None:
    """It has no gradient, where gradients are on too: the cache is written in place."""
    ours, _ = pair
    tokens = _tokens(pair, batch=2, seqlen=20)
    cache = KVCache(ours.config, 2, 20, device=ours.device)
    with torch.set_grad_enabled(grad):
        parts = [ours(part, cache=cache) for part in tokens.split([7, 1, 1, 6, 5], dim=1)]
        logits = torch.cat(parts, dim=1)
        assert not logits.requires_grad
        torch.testing.assert_close(logits, ours(tokens).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "message"),
    [
        ([[1, 2]], {}, TypeError, "input_ids must be a torch.Tensor, got list"),
        (NESTED, {}, TypeError, "input_ids is a nested tensor, .* pad it"),
        (torch.zeros(1, 3).long(), {"logits_to_keep": "1"}, TypeError, "logits_to_keep must be an"),
        (
            torch.zeros(1, 3).long(),
            {"logits_to_keep": True},
            TypeError,
            "logits_to_keep must be an",
        ),
        (torch.ones(1, 2), {}, TypeError, "input_ids must be int32 or int64.*got torch.float32"),
        (torch.tensor([1, 2]), {}, ValueError, r"input_ids must have the shape.*got \(2,\)"),
        (torch.zeros(2, 0).long(), {}, ValueError, r"input_ids must have the shape.*got \(2, 0\)"),
        (torch.zeros(0, 2).long(), {}, ValueError, r"input_ids must have the shape.*got \(0, 2\)"),
        (torch.tensor([[0, 97]]), {}, ValueError, "input_ids must be from 0 to .* 96, got 97"),
        (torch.tensor([[0, -1]]), {}, ValueError, "input_ids must be from 0 to .* 96, got -1"),
        (torch.zeros(1, 65).long(), {}, ValueError, "at most n_positions = 64 .* got 65"),
        (
            torch.zeros(1, 3).long(),
            {"targets": torch.zeros(1, 2).long()},
            ValueError,
            r"targets must have the shape of input_ids, \(1, 3\), got \(1, 2\)",
        ),
        (
            torch.zeros(1, 1).long(),
            {"targets": torch.tensor([[-1]])},
            ValueError,
            "targets must be from 0 to vocab_size - 1 = 96 or -100, got -1",
        ),
        (torch.zeros(1, 3).long(), {"logits_to_keep": 4}, ValueError, "logits_to_keep .* got 4"),
        (
            torch.zeros(1, 3).long(),
            {"logits_to_keep": 1, "targets": torch.zeros(1, 3).long()},
            ValueError,
            "logits_to_keep and targets exclude each other",
        ),
    ],
)
def test_bad_input(
    small: dict[str, Any], tokens: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = GPT(GPTConfig(**small))
    with pytest.raises(error, match=message):
        model(tokens, **kwargs)


def test_gradient_of_the_shared_weight(small: dict[str, Any]) -> None:
    """It is dense and the sum of both parts."""
    model = GPT(GPTConfig(**small)).eval()
    tokens = torch.randint(0, 97, (2, 9))
    (gradient,) = torch.autograd.grad(model(tokens, tokens)[1], model.wte.weight)
    assert gradient.layout is torch.strided
    apart = copy.deepcopy(model)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    parts = torch.autograd.grad(apart(tokens, tokens)[1], [apart.wte.weight, apart.lm_head.weight])
    torch.testing.assert_close(gradient, parts[0] + parts[1])


# --- the shared weight ---------------------------------------------------------------------------


def _is_tied(model: GPT) -> bool:
    names = dict(model.named_parameters(remove_duplicate=False))
    return model.lm_head.weight is model.wte.weight and len(names) == 1 + len(
        list(model.parameters())
    )


def _converted_by_overwriting(model: GPT) -> GPT:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _assigned(model: GPT) -> GPT:
    model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
    return model


def _assigned_on_meta(model: GPT) -> GPT:
    new = GPT(model.config, device="meta")
    new.load_state_dict(model.state_dict(), assign=True)
    return new


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to_empty(device="cpu"),
        lambda model: GPT(model.config, device="meta").to_empty(device="cpu"),
        lambda model: torch.nn.Sequential(GPT(model.config, device="meta")).to_empty(device="cpu")[0],
        lambda model: model.to(torch.bfloat16),
        _converted_by_overwriting,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        _assigned,
        _assigned_on_meta,
        lambda model: model.reset_parameters() or model,
    ],
    ids=[
        "to_empty", "meta to_empty", "inside of another", "to", "overwriting", "deepcopy", "pickle",
        "assign", "assign on meta", "reset",
    ],
)  # fmt: skip
def test_a_shared_weight_stays_shared(
    small: dict[str, Any], tied: bool, change: Callable[[GPT], GPT]
) -> None:
    model = change(GPT(GPTConfig(**small, tie_word_embeddings=tied)))
    assert _is_tied(model) == tied
    model.reset_parameters()
    assert _is_tied(model) == tied
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_untied_by_hand_stays_so(small: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**small))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 48))
    other = GPT(model.config)
    other.lm_head.weight = torch.nn.Parameter(torch.zeros(97, 48))
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), model.to(torch.float64).to(torch.float32), other):
        assert not _is_tied(copied)
        assert torch.equal(copied.lm_head.weight, model.lm_head.weight)
        assert torch.equal(copied.wte.weight, model.wte.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_head_of_its_own_is_not_lost_in_a_tied_model(small: dict[str, Any], assign: bool) -> None:
    apart = GPT(GPTConfig(**small, tie_word_embeddings=False)).state_dict()
    model = GPT(GPTConfig(**small))
    message = r"wte.weight and lm_head.weight are one parameter .* tie_word_embeddings=False"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(apart, assign=assign)
    outer = torch.nn.ModuleDict({"gpt": model})
    with pytest.raises(RuntimeError, match=r"gpt.wte.weight and gpt.lm_head.weight are one"):
        outer.load_state_dict({f"gpt.{k}": v for k, v in apart.items()}, assign=assign)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_may_hold_the_shared_weight_once(small: dict[str, Any], assign: bool) -> None:
    first, second = GPT(GPTConfig(**small)), GPT(GPTConfig(**small))
    weights = {k: v.clone() for k, v in first.state_dict().items() if k != "lm_head.weight"}
    assert not any(second.load_state_dict(weights, assign=assign))
    assert _is_tied(second)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert "lm_head.weight" not in weights


# --- transforms, fake tensors, tracing -----------------------------------------------------------


def test_gradients_of_each_sample(small: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**small))
    tokens = torch.randint(0, 97, (3, 9))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        batch = tokens[None]
        return torch.func.functional_call(model, parameters, (batch[:, :-1], batch[:, 1:]))[1]

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, tokens)
    for sample, row in enumerate(tokens):
        expected = torch.func.grad(loss)(parameters, row)
        for name, gradient in expected.items():
            torch.testing.assert_close(each[name][sample], gradient, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(lambda p: loss(p, tokens[0]), (parameters,), (parameters,))
    along = sum((expected * parameters[name]).sum() for name, expected in
                torch.func.grad(loss)(parameters, tokens[0]).items())  # fmt: skip
    torch.testing.assert_close(tangent, along, rtol=1e-4, atol=1e-4)


def test_wrong_tokens_are_named_under_grad(small: dict[str, Any]) -> None:
    """A transform of the weights leaves the tokens readable, and wrong ones are still named."""
    model = GPT(GPTConfig(**small))
    bias = model.norm_f.bias.detach()

    def loss(bias: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {"norm_f.bias": bias}, (tokens, tokens))[1]

    with pytest.raises(ValueError, match=r"input_ids must be from 0 to .* got 97"):
        torch.func.grad(loss)(bias, torch.tensor([[97]]))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(small: dict[str, Any], mode: str) -> None:
    model = GPT(GPTConfig(**small)).requires_grad_(False).eval()
    tokens = torch.randint(0, 97, (2, 9))
    traced = make_fx(
        lambda tokens: model(tokens, tokens), tracing_mode=mode, _allow_non_fake_inputs=True
    )(tokens)
    other = tokens.flip(0)
    torch.testing.assert_close(traced(other), model(other, other))


def test_fake_tensors(small: dict[str, Any]) -> None:
    with FakeTensorMode():
        model = GPT(GPTConfig(**small))
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        logits, loss = model(tokens, tokens)
        loss.backward()
    assert logits.shape == (2, 9, 97) and loss.shape == ()
    # Of a model with weights, and left outside of the mode.
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.zeros(1, 3).long())
    assert GPT(GPTConfig(**small))(fake).shape == (1, 3, 97)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_jit_trace(small: dict[str, Any]) -> None:
    """With the check of torch.jit.trace, which runs again without gradients."""
    model = GPT(GPTConfig(**small)).eval()
    tokens = torch.randint(0, 97, (2, 9))
    traced = torch.jit.trace(model, (tokens,))
    for other in (tokens.flip(0), tokens[:, :5]):
        torch.testing.assert_close(traced(other), model(other))
    with_loss = torch.jit.trace(model, (tokens, tokens))
    torch.testing.assert_close(with_loss(tokens.flip(0), tokens), model(tokens.flip(0), tokens))


def test_export(small: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**small)).eval()
    tokens = torch.randint(0, 97, (2, 9))
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(model, (tokens,), dynamic_shapes=({1: length},), strict=False)
    torch.testing.assert_close(exported.module()(tokens[:, :5]), model(tokens[:, :5]))


# --- computed weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda attention: prune.l1_unstructured(attention.in_proj, "weight", 0.3),
        lambda attention: torch.nn.utils.spectral_norm(attention.in_proj, "weight"),
        lambda attention: parametrizations.weight_norm(attention.in_proj, "weight"),
        lambda attention: prune.l1_unstructured(attention.out_proj, "weight", 0.3),
    ],
    ids=["pruned", "spectral norm", "weight norm", "pruned out_proj"],
)
def test_it_trains_with_computed_weights(
    small: dict[str, Any], change: Callable[[torch.nn.Module], object]
) -> None:
    model = GPT(GPTConfig(**{**small, "initializer_range": 0.02}))
    for block in model.blocks:
        change(block.attention)
    losses = _losses(model, 20)
    assert losses[-1] < losses[0] - 1


def test_targets_may_all_be_ignored(small: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**small))
    _, loss = model(torch.zeros(1, 2).long(), torch.full((1, 2), -100))
    assert loss.isnan()


def test_too_long_with_what_is_cached(small: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**small)).eval()
    cache = KVCache(model.config, 1, 100)
    with torch.no_grad():
        model(torch.zeros(1, 60).long(), cache=cache)
        with pytest.raises(ValueError, match=r"at most n_positions = 64 .* got 5 after 60 in the"):
            model(torch.zeros(1, 5).long(), cache=cache)
        model(torch.zeros(1, 4).long(), cache=cache)


@pytest.mark.parametrize("config", [{"vocab_size": 97}, "gpt2", None])
def test_a_config_of_another_kind(config: Any) -> None:
    with pytest.raises(TypeError, match=r"config must be a GPTConfig, got .* GPTConfig\.preset"):
        GPT(config)
