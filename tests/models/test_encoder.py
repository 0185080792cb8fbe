"""Encoder and its heads apart from any family: padding, losses, life as a module, errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn.models import (
    Encoder,
    EncoderConfig,
    EncoderForMaskedLM,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
)
from fastattn.models.encoder_heads import HEADS
from oracle import assert_close_to_reference

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "n_positions": 20,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 40,
    "n_token_types": 3,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
KINDS: dict[str, dict[str, Any]] = {
    "post": {},
    "counted": {"positions": "counted"},
    "pre": {
        "positions": "rotary",
        "norm_placement": "pre",
        "gated": True,
        "local_attention": 4,
        "layer_types": ("full_attention", "sliding_attention", "sliding_attention"),
        "rope_local_theta": 100.0,
        "pooler": False,
    },
}
BATCH, LENGTH = 3, 11


def _config(kind: str = "post", **changes: Any) -> EncoderConfig:
    return EncoderConfig(**{**SIZES, **KINDS[kind], **changes})


def _tokens() -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], (BATCH, LENGTH))


def _mask(side: str) -> torch.Tensor:
    """Sequences of 11, 4 and 1 tokens, padded on the right, the left, or at random places."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if side == "right":
        mask[1, 4:] = mask[2, 1:] = 0
    elif side == "left":
        mask[1, :-4] = mask[2, :-1] = 0
    else:
        mask[1, torch.randperm(LENGTH)[4:]] = 0
        mask[2, torch.randperm(LENGTH)[1:]] = 0
    return mask


@pytest.mark.parametrize("side", ["right", "left", "anywhere"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_nothing_and_may_hold_anything(kind: str, side: str) -> None:
    model, tokens, mask = Encoder(_config(kind)).eval(), _tokens(), _mask(side)
    types = torch.randint(0, 3, tokens.shape)
    first = model.config.first_position
    positions = torch.arange(first, first + LENGTH).expand(BATCH, -1).clone()
    alone = []
    for row in range(BATCH):
        here = mask[row].bool()
        # A window counts places, so that one with holes has no equal without them.
        if side == "anywhere" and kind == "pre":
            here = torch.ones(LENGTH, dtype=torch.bool)
            mask[row] = 1
        one = (x[row : row + 1, here] for x in (tokens, types, positions))
        ids, of, at = one
        alone.append(model(ids, token_type_ids=of, position_ids=at).hidden[0])
    hidden = mask == 0
    for inputs, anything in ((tokens, 10**6), (types, -7), (positions, 999)):
        inputs[hidden] = anything
    for given in (mask, mask.bool(), mask.int() * 5):
        together = model(tokens, given, token_type_ids=types, position_ids=positions).hidden
        for row in range(BATCH):
            torch.testing.assert_close(
                together[row, mask[row].bool()], alone[row], rtol=1e-4, atol=1e-4
            )
    assert together.isfinite().all()


@torch.no_grad()
def test_counted_positions_pass_over_padding() -> None:
    model, tokens = Encoder(_config("counted")).eval(), _tokens()
    tokens[0, :4] = 1
    mask = (tokens != 1).long()
    expected = model(tokens[:1, 4:]).hidden
    torch.testing.assert_close(model(tokens, mask).hidden[:1, 4:], expected, rtol=1e-4, atol=1e-4)


def test_a_sequence_of_padding_only_is_finite() -> None:
    model, mask = EncoderForSequenceClassification(_config("pre", pooling="cls")), _mask("right")
    mask[1] = 0
    out = model(_tokens(), mask, labels=torch.tensor([0, -100, 1]))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_mean_pooling_counts_visible_tokens() -> None:
    model = EncoderForSequenceClassification(_config("pre", pooling="mean")).eval()
    tokens = _tokens()
    alone = model(tokens[:1, :4]).logits
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[:, :4] = True
    torch.testing.assert_close(model(tokens, mask).logits[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_masked_tokens_is_that_of_the_logits(kind: str) -> None:
    model = EncoderForMaskedLM(_config(kind)).eval()
    tokens, mask, labels = _tokens(), _mask("right"), _tokens()
    labels[torch.rand(labels.shape) < 0.6] = -100
    logits, none = model(tokens, mask)
    assert none is None and logits.shape == (BATCH, LENGTH, SIZES["vocab_size"])

    def gradients(model: EncoderForMaskedLM) -> list[torch.Tensor]:
        logits = model(tokens, mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    nothing, loss = model(tokens, mask, labels=labels)
    assert nothing is None
    ours = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    exact = gradients(copy.deepcopy(model).double())
    for mine, eager, reference in zip(ours, gradients(model), exact, strict=True):
        assert_close_to_reference(mine, eager, reference)


def test_no_label_that_counts() -> None:
    model, tokens = EncoderForMaskedLM(_config()), _tokens()
    loss = model(tokens, labels=torch.full_like(tokens, -100)).loss
    loss.backward()
    assert loss.isnan()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_decoder_that_is_wrapped_is_called() -> None:
    """A hook or adapter on the decoder counts for the loss too."""
    model = EncoderForMaskedLM(_config()).eval()
    tokens, labels = _tokens(), _tokens()
    plain = model(tokens, labels=labels).loss
    model.decoder.register_forward_hook(lambda module, inputs, out: out * 0)
    uniform = torch.tensor(float(SIZES["vocab_size"])).log()
    torch.testing.assert_close(model(tokens, labels=labels).loss, uniform)
    assert (plain - uniform).abs() > 1e-3


def test_the_decoder_is_the_embedding() -> None:
    tied = EncoderForMaskedLM(_config())
    for copied in (tied, copy.deepcopy(tied), pickle.loads(pickle.dumps(tied)), tied.double()):
        assert copied.decoder.weight is copied.encoder.wte.weight
    apart = EncoderForMaskedLM(_config(tie_word_embeddings=False))
    assert apart.decoder.weight is not apart.encoder.wte.weight


@pytest.mark.parametrize("cls", (Encoder, *HEADS))
@pytest.mark.parametrize("kind", ["post", "pre"])
def test_state_dict_goes_round(cls: type, kind: str) -> None:
    config, tokens = _config(kind), _tokens()
    first, second = cls(config).eval(), cls(config, device="meta")
    assert all(p.is_meta for p in second.parameters())
    second = second.to_empty(device=tokens.device).eval()
    second.load_state_dict(first.state_dict())
    for one, other in zip(first(tokens), second(tokens), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", ["embd_pdrop", "attn_pdrop", "resid_pdrop", "classifier_pdrop"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model, tokens = EncoderForSequenceClassification(_config(**{name: 0.5})), _tokens()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_the_input_of_the_pooler_is_dropped_where_the_config_says_so() -> None:
    changes = {"classifier_pdrop": 1 - 1e-7, "pooler_dropout": True}
    model, tokens = EncoderForSequenceClassification(_config(**changes)), _tokens()
    model.classifier.weight.data.fill_(1.0)
    model.encoder.pooler.bias.data.fill_(0.5)
    # All is dropped twice: before the pooler, whose bias is left, and after it.
    torch.testing.assert_close(model(tokens).logits, model.classifier.bias.expand(BATCH, 2))


@pytest.mark.parametrize("kind", [pytest.param("counted", marks=pytest.mark.long), "pre"])
def test_compiles_in_one_graph(kind: str) -> None:
    model = EncoderForTokenClassification(_config(kind, n_layer=1, layer_types=None)).eval()
    tokens, mask = _tokens(), _mask("right")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    visible = mask.bool()
    torch.testing.assert_close(
        compiled(tokens, mask).logits[visible],
        model(tokens, mask).logits[visible],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_reads_no_value_of_another_device(kind: str) -> None:
    """On fake tensors, of which no value can be read."""
    with FakeTensorMode():
        model = EncoderForMaskedLM(_config(kind))
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        out = model(tokens, torch.ones_like(tokens), labels=tokens)
        assert out.loss.shape == ()
        assert model(tokens, torch.ones_like(tokens)).logits.shape[-1] == SIZES["vocab_size"]


def test_autocast(device: str) -> None:
    model, tokens = EncoderForSequenceClassification(_config("pre")).to(device), _tokens()
    tokens = tokens.to(device)
    expected = model(tokens).logits
    with torch.autocast(device, torch.bfloat16):
        logits, loss = model(tokens, labels=torch.tensor([0, 1, 0], device=device))
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    assert loss.dtype == torch.float32
    loss.backward()


def test_new_weights() -> None:
    model = EncoderForMaskedLM(_config(n_embd=64, initializer_range=0.1))
    parameters = dict(model.named_parameters())
    assert not model.encoder.wte.weight[1].any()  # padding
    assert not model.encoder.blocks[0].attention.in_proj.bias.any()
    assert (parameters["encoder.norm_e.weight"] == 1).all()
    spread = parameters["encoder.blocks.1.feed_forward.linear1.weight"].std()
    torch.testing.assert_close(spread, torch.tensor(0.1), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, t: m(t.float()), TypeError, "input_ids must be int32 or int64"),
        (lambda m, t: m(t[0]), ValueError, "input_ids must have the shape"),
        (lambda m, t: m([1, 2]), TypeError, "input_ids must be a torch.Tensor"),
        (lambda m, t: m(t + 60), ValueError, "input_ids must be from 0 to vocab_size - 1 = 60"),
        (lambda m, t: m(t.repeat(1, 2)), ValueError, "at most n_positions = 20 tokens"),
        (lambda m, t: m(t, t[:, 1:]), ValueError, "attention_mask must have the shape of"),
        (lambda m, t: m(t, t.float()), TypeError, "attention_mask must be boolean or integers"),
        (lambda m, t: m(t, [1]), TypeError, "attention_mask must be a torch.Tensor"),
        (lambda m, t: m(t, token_type_ids=t * 0 + 3), ValueError, "n_token_types - 1 = 2, got 3"),
        (lambda m, t: m(t, token_type_ids=t[:1]), ValueError, "token_type_ids must have the shape"),
        (lambda m, t: m(t, position_ids=t * 0 + 20), ValueError, "positions - 1 = 19, got 20"),
        (lambda m, t: m(t, position_ids=t[0]), ValueError, "position_ids must have the shape"),
    ],
)
def test_inputs_that_are_refused(
    call: Callable[..., Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(Encoder(_config()), _tokens())


def test_labels_that_are_refused() -> None:
    tokens = _tokens()
    masked, classes, tags, spans = (cls(_config(n_labels=3)) for cls in HEADS)
    with pytest.raises(ValueError, match="labels must be from 0 to vocab_size - 1 = 60 or -100"):
        masked(tokens, labels=tokens + 60)
    with pytest.raises(ValueError, match=r"labels must have the shape \(3, 11\)"):
        masked(tokens, labels=tokens[:, 1:])
    with pytest.raises(ValueError, match="labels must be from 0 to n_labels - 1 = 2 or -100"):
        classes(tokens, labels=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"labels must have the shape \(3, 3\)"):
        classes(tokens, labels=torch.rand(3))
    with pytest.raises(ValueError, match="labels must be from 0 to n_labels - 1 = 2 or -100"):
        tags(tokens, labels=tokens + 3)
    with pytest.raises(ValueError, match="go together"):
        spans(tokens, start_positions=tokens[:, 0])
    with pytest.raises(ValueError, match="no token types"):
        Encoder(_config(n_token_types=0))(tokens, token_type_ids=tokens)
    with pytest.raises(ValueError, match="has no pooler"):
        Encoder(_config("pre")).pooled(torch.rand(2, 3, 32))
    with pytest.raises(TypeError, match="config must be an EncoderConfig, got GPTConfig"):
        Encoder(fastattn.GPTConfig())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_head": 5}, ValueError, "n_head must divide n_embd"),
        ({"n_layer": 0}, ValueError, "n_layer must be at least 1"),
        ({"vocab_size": 5.0}, TypeError, "vocab_size must be an integer"),
        ({"activation_function": "tanh"}, ValueError, "activation_function must be one of"),
        ({"positions": "relative"}, ValueError, "positions must be one of"),
        ({"norm_placement": "both"}, ValueError, "norm_placement must be one of"),
        ({"pooling": "max"}, ValueError, "pooling must be one of"),
        ({"problem_type": "ranking"}, ValueError, "problem_type must be one of"),
        ({"pad_token_id": 61}, ValueError, "pad_token_id must be None or from 0 to"),
        ({"positions": "counted", "pad_token_id": None}, ValueError, "needs a pad_token_id"),
        ({"layer_types": ("sliding_attention",) * 3}, ValueError, "need a local_attention"),
        ({"layer_types": ("full_attention",)}, ValueError, "must have n_layer = 3 entries"),
        ({"positions": "rotary", "n_head": 32}, ValueError, "must be even for rotary"),
        ({"embd_pdrop": 1.0}, ValueError, "embd_pdrop must be in"),
        ({"classifier_pdrop": "x"}, TypeError, "classifier_pdrop must be a number"),
        ({"gated": 1}, TypeError, "gated must be True or False"),
        ({"label_names": ("a",)}, ValueError, "label_names must be n_labels = 2 names"),
        ({"layer_norm_epsilon": 0}, ValueError, "layer_norm_epsilon must be positive"),
    ],
    ids=str,
)
def test_configs_that_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EncoderConfig(**{**SIZES, **changes})


def test_config_resolved() -> None:
    config = _config("pre")
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.resolved().resolved() == config.resolved()
    said = _config(n_inner=128, layer_types=["full_attention"] * 3, classifier_pdrop=0.0)
    assert said.resolved() == _config(n_inner=None).resolved()
    assert config.window(0) is None and config.window(1) == (2, 2)
