"""GPT's logits, loss and gradients against transformers' GPT-2, and its errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastattn import GPT, GPTConfig
from fastattn.models import KVCache
from fastattn.models.folder.layout import layout
from oracle import assert_close_to_reference

Pair = tuple[GPT, transformers.GPT2LMHeadModel]
MakePair = Callable[..., Pair]

# Each differs from the default in a way that changes the logits.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"tie_word_embeddings": False},
    {"n_inner": 20},
    {"activation_function": "gelu"},
    {"activation_function": "relu"},
    {"activation_function": "silu"},
    {"layer_norm_epsilon": 0.1},
    {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
]


def _tokens(pair: Pair, batch: int = 2, seqlen: int = 33) -> torch.Tensor:
    return torch.randint(0, pair[0].config.vocab_size, (batch, seqlen), device=pair[0].device)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: next(iter(changes), "default"))
def test_logits_equal_transformers(make_pair: MakePair, changes: dict[str, Any]) -> None:
    ours, theirs = make_pair(**changes)
    tokens = _tokens((ours, theirs))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def _gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _their_loss(
    theirs: transformers.GPT2LMHeadModel, tokens: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    logits = theirs(tokens).logits
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_hold_the_rule(make_pair: MakePair, dtype: torch.dtype) -> None:
    # bfloat16 needs a model that does not amplify rounding without bounds.
    ours, theirs = make_pair(dtype=dtype, initializer_range=0.1)
    exact = copy.deepcopy(theirs).double()
    tokens, targets = _tokens((ours, theirs)), _tokens((ours, theirs))
    targets[:, ::5] = -100
    logits, loss = ours(tokens, targets)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    with torch.no_grad():
        assert_close_to_reference(
            logits, theirs(tokens).logits, exact(tokens).logits, name="logits"
        )
    got = _gradients(ours, loss)
    eager = _gradients(theirs, _their_loss(theirs, tokens, targets))
    reference = _gradients(exact, _their_loss(exact, tokens, targets))
    stored = layout(ours.config)
    assert got.keys() == stored.keys()
    for name, how in stored.items():
        theirs_name = f"transformer.{how.name}"
        assert_close_to_reference(
            got[name].T if how.transposed else got[name],
            eager[theirs_name],
            reference[theirs_name],
            name=name,
        )


def test_loss_is_transformers_loss(pair: Pair) -> None:
    ours, theirs = pair
    tokens = _tokens(pair)
    _, loss = ours(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss, atol=1e-5, rtol=0)


def test_head_is_the_embedding(small: dict[str, Any]) -> None:
    tied = GPT(GPTConfig(**small))
    assert tied.lm_head.weight is tied.wte.weight
    apart = GPT(GPTConfig(**small, tie_word_embeddings=False))
    assert apart.lm_head.weight is not apart.wte.weight
    for copied in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied)), tied.to(torch.float64)):
        assert copied.lm_head.weight is copied.wte.weight


def test_state_dict_goes_round(small: dict[str, Any]) -> None:
    first, second = GPT(GPTConfig(**small)).eval(), GPT(GPTConfig(**small)).eval()
    second.load_state_dict(first.state_dict())
    tokens = torch.randint(0, 97, (1, 5))
    assert torch.equal(first(tokens), second(tokens))


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


def test_training_lowers_the_loss(small: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**{**small, "initializer_range": 0.02}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, 97, (4, 17))
    losses = []
    for _ in range(60):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
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


def test_cache_in_parts_equals_the_whole(pair: Pair) -> None:
    ours, _ = pair
    tokens = _tokens(pair, batch=2, seqlen=20)
    cache = KVCache(ours.config, 2, 20, device=ours.device)
    with torch.no_grad():
        parts = [ours(part, cache=cache) for part in tokens.split([7, 1, 1, 6, 5], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), ours(tokens), atol=1e-4, rtol=0)


def test_a_cache_has_no_gradient(pair: Pair) -> None:
    """Where gradients are on, too: the cache is written in place."""
    ours, _ = pair
    tokens = _tokens(pair, batch=2, seqlen=20)
    cache = KVCache(ours.config, 2, 20, device=ours.device)
    parts = [ours(part, cache=cache) for part in tokens.split([10, 10], dim=1)]
    logits = torch.cat(parts, dim=1)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, ours(tokens).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "message"),
    [
        ([[1, 2]], {}, TypeError, "input_ids must be a torch.Tensor, got list"),
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


def test_gradient_of_the_shared_weight(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dense and the sum of both parts, by whatever way the tokens are embedded."""
    monkeypatch.setattr("fastattn.models.gpt.LARGE", 1)
    model = GPT(GPTConfig(**small)).eval()
    tokens = torch.randint(0, 97, (2, 9))
    _, loss = model(tokens, tokens)
    (gradient,) = torch.autograd.grad(loss, model.wte.weight)
    expected_loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    (expected,) = torch.autograd.grad(expected_loss, model.wte.weight)
    assert not gradient.is_sparse
    torch.testing.assert_close(gradient, expected)
    (of_features,) = torch.autograd.grad(model.features(tokens).sum(), model.wte.weight)
    assert not of_features.is_sparse


@pytest.mark.parametrize(
    ("name", "value"), [("padding_idx", 3), ("max_norm", 0.01), ("scale_grad_by_freq", True)]
)
def test_what_the_embedding_is_told_beside_the_head(
    monkeypatch: pytest.MonkeyPatch, small: dict[str, Any], name: str, value: Any
) -> None:
    gradients = []
    for large in (1, 1 << 60):
        monkeypatch.setattr("fastattn.models.gpt.LARGE", large)
        torch.manual_seed(0)
        model = GPT(GPTConfig(**small)).eval()
        setattr(model.wte, name, value)
        tokens = torch.tensor([[3, 3, 5, 7, 5]])
        gradients += torch.autograd.grad(model(tokens, tokens)[1], model.wte.weight)
    torch.testing.assert_close(*gradients)


def test_a_loss_of_what_a_hook_saw_has_a_dense_gradient(
    monkeypatch: pytest.MonkeyPatch, small: dict[str, Any]
) -> None:
    monkeypatch.setattr("fastattn.models.gpt.LARGE", 1)
    model = GPT(GPTConfig(**small)).eval()
    seen = []
    model.dropout.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.zeros(1, 5).long(), torch.zeros(1, 5).long())
    seen[0].sum().backward()
    assert model.wte.weight.grad is not None and not model.wte.weight.grad.is_sparse


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
