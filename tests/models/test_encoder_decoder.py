"""EncoderDecoder and its config by themselves; tests/models/families has transformers' models."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from fastattn.models import EncoderDecoder, EncoderDecoderConfig
from fastattn.models.encoder_decoder import sinusoids
from fastattn.models.encoder_decoder_config import PRESETS

SMALL: dict[str, Any] = {
    "vocab_size": 61, "n_positions": 20, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}  # fmt: skip
RELATIVE = {"positions": "relative", "norm": "rms_norm", "norm_placement": "pre", "bias": False}


def _model(**changes: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(EncoderDecoderConfig(**{**SMALL, **changes})).eval()


def _tokens(batch: int = 2, seqlen: int = 9) -> torch.Tensor:
    return torch.randint(2, 61, (batch, seqlen))


def test_sinusoids_are_those_of_2017() -> None:
    """Section 3.5, where sine and cosine of a frequency are neighbours."""
    got = sinusoids(torch.arange(40), 10)
    for position in (0, 1, 39):
        for i in range(5):
            angle = torch.tensor(position / 10000 ** (2 * i / 10), dtype=torch.float64)
            torch.testing.assert_close(got[position, i], angle.sin())
            torch.testing.assert_close(got[position, 5 + i], angle.cos())


def test_shift_right() -> None:
    model = _model(decoder_start_token_id=7, pad_token_id=3)
    targets = torch.tensor([[11, 12, -100, 13], [14, -100, -100, -100]])
    assert model.shift_right(targets).tolist() == [[7, 11, 12, 3], [7, 14, 3, 3]]
    source = _tokens()
    logits, loss = model(source, targets=targets)
    again, same = model(source, model.shift_right(targets), targets)
    assert torch.equal(logits, again) and torch.equal(loss, same)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_placement": "pre"},
        {**RELATIVE, "attention_scale": 1.0, "logits_scale": 32**-0.5, "gated": True},
        {"positions": "learned", "embedding_norm": True, "initializer_range": 0.3},
    ],
    ids=["sinusoidal", "pre-norm", "relative", "learned"],
)
def test_learns_to_copy(changes: dict[str, Any]) -> None:
    """From the loss of who knows nothing, without a loss that is NaN or far above."""
    model = _model(tie_word_embeddings=False, **changes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, losses = _tokens(6, 5), []
    for _ in range(40):
        loss = model(tokens, targets=tokens)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 6.0  # log 61 = 4.1
    assert min(losses[-5:]) < 1.5


def test_new_weights_keep_the_variance() -> None:
    """Scores of queries and keys have about the variance 1, scaled or not."""
    for scale in (1.0, None):
        model = _model(d_model=256, attention_scale=scale, **RELATIVE)
        attention = model.encoder.blocks[0].attention
        q, k, _ = attention._split(attention.in_proj(torch.randn(1, 200, 256)))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or attention.head_dim**-0.5)
        assert 0.7 < scores.std() < 1.4
    assert model.embedding.weight.std().item() == pytest.approx(1.0, abs=0.05)


def test_padding_of_the_source_counts_for_nothing() -> None:
    model, source, target = _model(**RELATIVE), _tokens(), _tokens(2, 4)
    mask = torch.ones_like(source)
    mask[0, 6:] = mask[1, :3] = 0
    expected = model(source, target, attention_mask=mask)
    other = torch.where(mask.bool(), source, _tokens())
    assert torch.equal(model(other, target, attention_mask=mask), expected)
    alone = model(source[:1, :6], target[:1])
    torch.testing.assert_close(alone, expected[:1], atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    source, target = _tokens(), _tokens()
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        for gated in (False, True):
            model = _model(**{name: 0.5}, gated=gated)
            assert torch.equal(model(source, target), model(source, target))
            model.train()
            assert not torch.equal(model(source, target), model(source, target)), name


def test_the_head_is_the_embedding_of_both_sides() -> None:
    tied, apart = _model(), _model(tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.embedding.weight
    for model in (tied, copy.deepcopy(tied), tied.to(torch.float64)):
        assert model.lm_head.weight is model.embedding.weight
        names = [name for name, _ in model.named_parameters() if "embedding" in name]
        assert names == ["embedding.weight"]


def test_padding_and_the_bias_of_the_logits_are_not_trained() -> None:
    model = _model(frozen_padding=True, logits_bias=True, pad_token_id=5)
    assert not model.embedding.weight[5].any()
    source = _tokens()
    source[:, 3] = 5
    model(source, targets=_tokens())[1].backward()
    assert model.lm_head.logits_bias is not None and model.lm_head.logits_bias.grad is None
    apart = _model(frozen_padding=True, pad_token_id=5, tie_word_embeddings=False)
    apart(source, targets=_tokens())[1].backward()
    assert apart.embedding.weight.grad is not None
    assert not apart.embedding.weight.grad[5].any()


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, RELATIVE], ids=["sinusoidal", "relative"])
def test_compiles_whole(changes: dict[str, Any]) -> None:
    model = _model(encoder_layers=1, decoder_layers=1, **changes)
    source, target = _tokens(), _tokens(2, 5)
    mask = torch.ones_like(source)
    mask[0, 6:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, loss = compiled(source, targets=target, attention_mask=mask)
    expected, expected_loss = model(source, targets=target, attention_mask=mask)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, expected_loss)


@torch.no_grad()
def test_autocast() -> None:
    """A cache made under it has its dtype; one made before serves too."""
    model, source, tokens = _model(**RELATIVE), _tokens(), _tokens(2, 3)
    before = model.new_cache(2, 4, encoded=model.encode(source))
    expected = model.features(tokens, before)
    before.reset()
    with torch.autocast("cpu", torch.bfloat16):
        under = model.new_cache(2, 4, encoded=model.encode(source))
        assert under.layers[0].keys.dtype == under.contexts[0].keys.dtype == torch.bfloat16
        for cache in (before, under):
            got = model.features(tokens, cache)
            torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1, check_dtype=False)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([[1]],), {}, TypeError, "input_ids must be a torch.Tensor"),
        ((_tokens(),), {}, ValueError, "decoder_input_ids must be given where there are no tar"),
        ((_tokens() + 60, _tokens()), {}, ValueError, "input_ids must be from 0 to .* 60"),
        ((_tokens(), -_tokens()), {}, ValueError, "decoder_input_ids must be from 0 to .* 60"),
        ((_tokens(), _tokens(3)), {}, ValueError, "the same batch size, got 2 and 3"),
        ((_tokens(2, 21), _tokens()), {}, ValueError, "at most n_positions = 20 tokens, got 21"),
        ((_tokens(), _tokens(2, 21)), {}, ValueError, "at most n_positions = 20 tokens, got 21"),
        ((_tokens(), _tokens(), _tokens(2, 4)), {}, ValueError, "shape of decoder_input_ids"),
        (
            (_tokens(), _tokens()),
            {"attention_mask": torch.ones(2, 8)},
            ValueError,
            r"attention_mask must have the shape .* \(2, 9\), got \(2, 8\)",
        ),
        (
            (_tokens(), _tokens()),
            {"decoder_attention_mask": torch.ones(9)},
            ValueError,
            "decoder_attention_mask must have the shape",
        ),
        ((_tokens(), _tokens()), {"keep_logits": False}, ValueError, "needs targets"),
    ],
)
def test_bad_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _model()(*args, **kwargs)


def test_bad_caches() -> None:
    model = _model()
    encoded = model.encode(_tokens())
    with pytest.raises(ValueError, match=r"encoded must have the shape .* got \(2, 9, 32\)"):
        model.new_cache(3, 4, encoded=encoded)
    with pytest.raises(ValueError, match="encoded_lengths must have the shape"):
        model.new_cache(2, 4, encoded=encoded, encoded_lengths=torch.ones(3))
    with pytest.raises(ValueError, match="either cache or encoded"):
        model.features(_tokens())
    cache = model.new_cache(2, 4, encoded=encoded)
    with pytest.raises(ValueError, match="either cache or encoded"):
        model.features(_tokens(), cache, encoded=encoded)
    with pytest.raises(ValueError, match="the masks must be None"):
        model.features(_tokens(2, 2), cache, attention_mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match="room for 4 tokens"):
        model.features(_tokens(2, 5), cache)
    with pytest.raises(ValueError, match="decoder_start_token_id and pad_token_id"):
        _model(decoder_start_token_id=None).shift_right(_tokens())
    with pytest.raises(TypeError, match="config must be an EncoderDecoderConfig, got dict"):
        EncoderDecoder(SMALL)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    """As many parameters as are published (of the Transformer 65 and 213 million, rounded)."""
    millions = {
        "transformer-base": 63.1, "transformer-big": 214.3, "t5-small": 60.5, "t5-base": 222.9,
        "t5-large": 737.7, "t5-v1_1-small": 77.0, "t5-v1_1-base": 247.6, "t5-v1_1-large": 783.2,
        "bart-base": 139.5, "bart-large": 406.3,
    }  # fmt: skip
    model = EncoderDecoder(EncoderDecoderConfig.preset(name), device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions[name], abs=0.06)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model must be at least 1, got 0"),
        ({"encoder_layers": 1.5}, TypeError, "encoder_layers must be an integer"),
        ({"n_positions": None}, ValueError, 'positions="sinusoidal": only "relative"'),
        ({"d_model": 33, "encoder_attention_heads": 3}, ValueError, "decoder_attention_heads must"),
        ({"encoder_attention_heads": 3}, ValueError, "encoder_attention_heads must divide"),
        ({"d_model": 33, "head_size": 8}, ValueError, "d_model must be even for sinusoidal"),
        ({"positions": "rotary"}, ValueError, "positions must be one of 'sinusoidal'"),
        ({"norm_placement": "both"}, ValueError, "norm_placement must be one of 'pre', 'post'"),
        ({"activation_function": "tanh"}, ValueError, "activation_function must be one of"),
        ({"bias": 1}, TypeError, "bias must be True or False"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"logits_scale": 0.0}, ValueError, "logits_scale must be positive"),
        ({"layer_norm_epsilon": None}, TypeError, "layer_norm_epsilon must be a number"),
        ({"position_offset": -1}, ValueError, "position_offset must be at least 0"),
        ({"eos_token_id": [1, "2"]}, TypeError, "each eos_token_id must be an integer"),
        ({"frozen_padding": True, "pad_token_id": 61}, ValueError, "pad_token_id must be from 0"),
    ],
)
def test_bad_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EncoderDecoderConfig(**{**SMALL, **changes})
    with pytest.raises(ValueError, match="name must be one of 'transformer-base'"):
        EncoderDecoderConfig.preset("t6")


def test_configs_are_values() -> None:
    config = EncoderDecoderConfig(**SMALL, eos_token_id=[1, 2])
    assert hash(config) == hash(dataclasses.replace(config)) and config.eos_token_id == (1, 2)
    assert config.is_encoder_decoder and config.head_dim == 8
