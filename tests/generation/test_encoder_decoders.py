"""generate on a small encoder-decoder, against the model without a cache and by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.models import EncoderDecoder, EncoderDecoderConfig

V = 11
SOURCES = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]


def _model(**changes: Any) -> EncoderDecoder:
    """Its tokens differ by source and by place."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"vocab_size": V, "n_positions": 24, "d_model": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
    kind = {"positions": "learned", "norm_placement": "pre", "tie_word_embeddings": False}
    special = {"eos_token_id": None, "pad_token_id": None, "decoder_start_token_id": 2}
    config = {**sizes, **kind, **special, "initializer_range": 0.8, **changes}
    return EncoderDecoder(EncoderDecoderConfig(**config)).eval()


@torch.no_grad()
def _log_probs(model: EncoderDecoder, source: list[int], text: list[list[int]]) -> Tensor:
    """(N, T, V) after each token of ``text`` (N, T), for one source, without a cache."""
    ids = torch.tensor([source])
    encoded = model.encode(ids, torch.ones_like(ids)).expand(len(text), -1, -1)
    return model.lm_head(model.features(torch.tensor(text), encoded=encoded)).log_softmax(-1)


def test_greedy_equals_the_model_without_a_cache() -> None:
    model = _model()
    got = model.generate(SOURCES, max_new_tokens=12)
    assert got.shape == (3, 13)
    for row, source in zip(got.tolist(), SOURCES, strict=True):
        text = [2]
        for _ in range(12):
            text.append(int(_log_probs(model, source, [text])[0, -1].argmax()))
        assert row == text
    assert len(set(map(tuple, got.tolist()))) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_source_does_not_count(side: str) -> None:
    model = _model()
    ids, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)
    for row, source in enumerate(SOURCES):
        where = slice(len(source)) if side == "right" else slice(6 - len(source), 6)
        ids[row, where], mask[row, where] = torch.tensor(source), 1
    expected = model.generate(SOURCES, max_new_tokens=8)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8), expected)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="must hide padding before or after the tokens"):
        model.generate(ids, attention_mask=mask, max_new_tokens=8)


def test_as_many_beams_as_tokens_find_the_best_pair() -> None:
    """Of all V * V, by brute force, for each source."""
    model = _model()
    got = model.generate(SOURCES, max_new_tokens=2, num_beams=V, num_return_sequences=4)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    texts = torch.cat([torch.full((V * V, 1), 2), pairs], dim=1)
    for row, source in enumerate(SOURCES):
        logs = _log_probs(model, source, texts.tolist())[:, :2]
        best = logs.gather(-1, pairs.unsqueeze(-1)).sum((1, 2)).topk(4).indices
        assert torch.equal(got[4 * row : 4 * row + 4], texts[best])


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "seed": [1, 2, 3]},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "forced_bos_token_id": 5},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
    ids=str,
)
def test_a_batch_equals_each_source_alone(how: dict[str, Any]) -> None:
    model = _model()
    settings = {"max_new_tokens": 14, "eos_token_id": [3, 9], "pad_token_id": 10, **how}
    together = model.generate(SOURCES, **settings)
    for row, source in enumerate(SOURCES):
        alone = {**settings, "seed": [1 + row]} if "seed" in settings else settings
        out = model.generate([source], **alone)[0]
        assert torch.equal(together[row, : len(out)], out)
        assert (together[row, len(out) :] == 10).all()


def test_the_start_token() -> None:
    model = _model()
    assert model.generate([[1]], max_new_tokens=2, decoder_start_token_id=4)[0, 0] == 4
    model = _model(decoder_start_token_id=None, bos_token_id=6)
    assert model.generate([[1]], max_new_tokens=2)[0, 0] == 6
    with pytest.raises(ValueError, match="needs decoder_start_token_id: neither the call nor"):
        _model(decoder_start_token_id=None).generate([[1]], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"decoder_start_token_id must be from 0 .* = 10, got 11"):
        _model(decoder_start_token_id=V).generate([[1]], max_new_tokens=2)


def test_bad_input() -> None:
    model = _model()
    with pytest.raises(ValueError, match="speculation is for decoders"):
        model.generate([[1]], max_new_tokens=2, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="more than the model's n_positions = 24"):
        model.generate([[1]], max_new_tokens=24)
    model = _model(n_positions=None, positions="relative")
    assert model.generate([[1]], max_new_tokens=20).shape == (1, 21)
