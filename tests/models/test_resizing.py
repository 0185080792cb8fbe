"""resize_token_embeddings: as transformers, whose new rows have a little noise more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastattn import GPT, GPTConfig
from fastattn.models import EncoderDecoder

Pair = tuple[GPT, transformers.GPT2LMHeadModel]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("count", "multiple"), [(110, None), (60, None), (97, 8), (100, 64)])
def test_equals_transformers(
    make_pair: Callable[..., Pair], tied: bool, count: int, multiple: int | None
) -> None:
    ours, theirs = make_pair(tie_word_embeddings=tied)
    returned = ours.resize_token_embeddings(count, multiple)
    theirs.resize_token_embeddings(count, multiple)
    assert returned is ours.wte and (ours.lm_head.weight is ours.wte.weight) == tied
    size = theirs.config.vocab_size
    assert ours.config.vocab_size == ours.wte.num_embeddings == ours.lm_head.out_features == size
    tokens = torch.randint(0, min(size, 97), (2, 9), device=ours.device)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-2, rtol=1e-3)


def test_old_rows_stay_and_new_ones_are_their_mean(make_pair: Callable[..., Pair]) -> None:
    ours, _ = make_pair()
    before = ours.wte.weight.detach().clone()
    weight = ours.resize_token_embeddings(99).weight
    assert torch.equal(weight[:97], before) and weight.requires_grad
    torch.testing.assert_close(weight[97:], before.mean(0).expand(2, -1))
    _, loss = ours(
        torch.full((1, 4), 98, device=ours.device), torch.full((1, 4), 97, device=ours.device)
    )
    loss.backward()
    assert ours.wte.weight.grad.shape == (99, 48)
    assert ours.generate([[98, 1]], max_new_tokens=3).shape == (1, 5)


def test_the_bias_of_a_head_too(small: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**{**small, "head_bias": True, "tie_word_embeddings": False}))
    bias = torch.nn.init.normal_(model.lm_head.bias).detach().clone()
    model.resize_token_embeddings(99)
    torch.testing.assert_close(model.lm_head.bias[97:], bias.mean().expand(2))
    assert model(torch.tensor([[98, 3]])).shape == (1, 2, 99)


@pytest.mark.parametrize("count", [70, 50])
def test_an_encoder_decoder_equals_transformers(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=61, d_model=32, max_position_embeddings=20, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
        decoder_ffn_dim=40, init_std=0.3,
    )  # fmt: skip
    theirs = transformers.BartForConditionalGeneration(config).eval()
    theirs.final_logits_bias.normal_()
    theirs.save_pretrained(tmp_path)
    ours = EncoderDecoder.from_pretrained(tmp_path)
    assert ours.resize_token_embeddings(count) is ours.embedding
    theirs.resize_token_embeddings(count)
    assert ours.lm_head.weight is ours.embedding.weight and ours.config.vocab_size == count
    source, target = torch.randint(3, 50, (2, 2, 9))
    with torch.no_grad():
        expected = theirs(source, decoder_input_ids=target).logits
        torch.testing.assert_close(ours(source, target), expected, atol=1e-2, rtol=1e-3)
    assert ours.lm_head.logits_bias.shape == (1, count)


def test_without_a_number(make_pair: Callable[..., Pair]) -> None:
    ours, _ = make_pair()
    weight = ours.wte.weight
    assert ours.resize_token_embeddings() is ours.wte and ours.wte.weight is weight


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "new_num_tokens must be at least 1, got 0"),
        ((1.5,), TypeError, "new_num_tokens must be an integer or None, got 1.5"),
        ((100, 0), ValueError, "pad_to_multiple_of must be at least 1, got 0"),
    ],
)
def test_errors(
    make_pair: Callable[..., Pair], arguments: Any, error: type[Exception], message: str
) -> None:
    ours, _ = make_pair()
    with pytest.raises(error, match=message):
        ours.resize_token_embeddings(*arguments)
