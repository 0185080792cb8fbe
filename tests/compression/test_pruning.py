"""Pruning: which weights go, and that a smaller model computes what the masked one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

import fastattn
from fastattn.compression import prune_features, prune_heads, prune_weights, smaller
from fastattn.nn import Attention, FeedForward

LLAMA: dict[str, Any] = {
    "norm": "rms_norm", "positions": "rotary", "gated": True, "activation_function": "silu",
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "n_kv_head": 3, "n_head": 6,
}  # fmt: skip
KINDS = {
    "gpt2": {},
    "llama": LLAMA,
    "qk_norm": {**LLAMA, "qk_norm": "head"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
}


def _gpt(**options: Any) -> fastattn.GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 48, "n_layer": 2, "n_head": 4}
    model = fastattn.GPT(fastattn.GPTConfig(**{**sizes, "initializer_range": 0.3, **options}))
    for parameter in model.parameters():  # biases of 0 would hide that one is lost
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 1 else None
    return model.eval()


def _tokens() -> torch.Tensor:
    return torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_smaller_equals_masked(options: dict[str, Any]) -> None:
    model = _gpt(**options)
    before = model(_tokens())
    prune_heads(model, 2)
    prune_features(model, 75)
    masked = model(_tokens())
    small = smaller(model)
    scale = masked.abs().max()
    assert (masked - before).abs().max() > 0.01 * scale
    assert (small(_tokens()) - masked).abs().max() <= 1e-5 * scale
    assert small.config.kv_heads == 2 and small.config.feedforward_dim == 75
    assert small.config.head_dim == model.config.head_dim
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(small) < 0.8 * count(_gpt(**options))
    assert not any("_orig" in name for name in small.state_dict())


@torch.no_grad()
def test_the_least_heads_and_features_go() -> None:
    model = _gpt()
    attention, part = model.blocks[1].attention, model.blocks[0].feed_forward
    assert isinstance(attention, Attention) and isinstance(part, FeedForward)
    size, width = attention.head_dim, attention.num_heads * attention.head_dim
    for row in range(2):  # of head 2: q, k, v and what is read of it
        for rows in (row * width + 2 * size, row * width + 3 * size - 1):
            attention.in_proj.weight[rows] *= 0.01
    attention.in_proj.weight[2 * size : 3 * size] *= 0.01
    attention.out_proj.weight[:, 2 * size : 3 * size] *= 0.01
    part.linear1.weight[5] *= 0.01
    part.linear2.weight[:, 5] *= 0.01
    prune_heads(model, 3)
    prune_features(model, 191)
    kept = attention.out_proj.weight_mask.any(0).view(4, -1).all(1)
    assert kept.tolist() == [True, True, False, True]
    assert part.linear2.weight_mask.all(0).logical_not().nonzero().flatten().tolist() == [5]


def test_masked_heads_stay_out_of_training() -> None:
    model = _gpt(**LLAMA).train()
    prune_heads(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = _tokens()
    before = model.blocks[0].attention.out_proj.weight_orig.detach().clone()
    _, loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    optimizer.step()
    projection = model.blocks[0].attention.out_proj
    mask = projection.weight_mask.bool()
    assert not torch.equal(projection.weight_orig[mask], before[mask])
    assert torch.equal(projection.weight_orig[~mask], before[~mask])
    with torch.no_grad():
        model.eval()
        expected = model(tokens)
        torch.testing.assert_close(smaller(model)(tokens), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_smaller_llama_is_saved(tmp_path: Path) -> None:
    model = _gpt(**LLAMA)
    prune_heads(model, 2)
    prune_features(model, 64)
    small = smaller(model)
    small.save_pretrained(tmp_path)
    assert torch.equal(fastattn.models.load(tmp_path)(_tokens()), small(_tokens()))


@torch.no_grad()
def test_smallest_weights(tmp_path: Path) -> None:
    model = _gpt(tie_word_embeddings=False)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    values = torch.cat([layer.weight.abs().flatten() for layer in layers])
    prune_weights(model, 0.3)
    pruned = torch.cat([(layer.weight_mask == 0).flatten() for layer in layers])
    assert abs(pruned.float().mean().item() - 0.3) < 1e-3
    assert values[pruned].max() <= values[~pruned].min()
    expected = model(_tokens())
    model.save_pretrained(tmp_path)  # the masked weights
    assert torch.equal(fastattn.models.load(tmp_path)(_tokens()), expected)
    for layer in layers:
        prune.remove(layer, "weight")
    assert torch.equal(model(_tokens()), expected)


def test_a_tied_head_is_left_alone() -> None:
    model = _gpt()
    prune_weights(model, 0.5)
    assert model.lm_head.weight is model.wte.weight and bool(model.wte.weight.all())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: prune_heads(_gpt(), 0), "keep must be from 1 to the model's 4 key-value heads"),
        (lambda: prune_heads(_gpt(**LLAMA), 4), "model's 3 key-value heads, got 4"),
        (lambda: prune_features(_gpt(), 193), "192 hidden features"),
        (lambda: prune_weights(_gpt(), 1.0), "share must be above 0 and below 1"),
        (lambda: prune_weights(torch.nn.ReLU(), 0.5), "no linear layer"),
        (lambda: prune_heads(_gpt(**LLAMA, qk_norm="all"), 1), "qk_norm"),
    ],
)
def test_bad_input(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_other_models_and_layers_that_differ() -> None:
    with pytest.raises(TypeError, match=r"fastattn.GPT, got Linear"):
        smaller(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    model = _gpt()
    with torch.no_grad():
        model.blocks[0].feed_forward.linear2.weight[:, 3] = 0
    with pytest.raises(ValueError, match=r"layers have \[191, 192\]"):
        smaller(model)
