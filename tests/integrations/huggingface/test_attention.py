"""The attention implementation "fastattn" of transformers, for any of its models."""

from __future__ import annotations

import importlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastattn
from fastattn.integrations import huggingface
from fastattn.integrations.huggingface import NAME, attention_forward, register

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def test_registered() -> None:
    register()  # twice is harmless
    assert AttentionInterface()[NAME] is attention_forward
    assert NAME in AttentionMaskInterface()


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5 or later; this is 4\.57\.1"):
        importlib.reload(huggingface)


def module(kv_groups: int = 1, is_causal: bool = True) -> Any:
    return SimpleNamespace(num_key_value_groups=kv_groups, is_causal=is_causal, training=False)


def tensors(
    device: str, seqlen_q: int, seqlen_k: int, kv_heads: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, 6, seqlen_q, 8, device=device)
    k, v = torch.randn(2, 2, kv_heads, seqlen_k, 8, device=device)
    return q, k, v


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [
        (7, 7),
        (1, 7),  # decoding
        (5, 9),  # prefill into an empty static cache: its rest is not seen
    ],
)
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_as_sdpa_without_a_mask(
    device: str, seqlen_q: int, seqlen_k: int, kv_heads: int, is_causal: bool | None
) -> None:
    q, k, v = tensors(device, seqlen_q, seqlen_k, kv_heads)
    for causal, scaling in itertools.product((True, False), (None, 0.7)):
        host = module(6 // kv_heads, causal)
        arguments = {"scaling": scaling, "is_causal": is_causal}
        expected, _ = sdpa_attention_forward(host, q, k, v, None, **arguments)
        found, weights = attention_forward(host, q, k, v, None, **arguments)
        assert weights is None
        torch.testing.assert_close(found, expected)


def test_as_sdpa_with_a_mask(device: str) -> None:
    q, k, v = tensors(device, 5, 9, kv_heads=2)
    mask = torch.rand(2, 1, 5, 9, device=device) < 0.5
    mask[..., 0] = True
    expected, _ = sdpa_attention_forward(module(3), q, k, v, mask)
    found, _ = attention_forward(module(3), q, k, v, mask)
    torch.testing.assert_close(found, expected)


def test_a_query_that_sees_nothing_gives_zero(device: str) -> None:
    q, k, v = tensors(device, 3, 4)
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool, device=device)
    mask[1, :, 2] = False
    found, _ = attention_forward(module(), q, k, v, mask)
    assert torch.equal(found[1, 2], torch.zeros_like(found[1, 2]))
    assert found[1, 1].abs().min() > 0


def test_dropout(device: str) -> None:
    q, k, _ = tensors(device, 64, 64)
    ones = torch.ones_like(k)
    found, _ = attention_forward(module(), q, k, ones, None, dropout=0.5)
    # Kept weights are doubled: each output is 1 in the mean, and 1 exactly without dropout.
    assert found.mean().item() == pytest.approx(1, abs=0.1)
    assert found.std().item() > 0.1


class TestWhatCannotBeHonoured:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"softcap": 30.0}, r"softcap: fastattn does not support soft-capped scores"),
            ({"s_aux": torch.zeros(6)}, r"s_aux: .* attention sinks"),
            ({"sinks": torch.zeros(6)}, r"sinks: .* attention sinks"),
            ({"position_bias": torch.zeros(1, 6, 7, 7)}, r"position_bias: .* an additive bias"),
            ({"head_mask": torch.ones(6)}, r"head_mask: .* a mask of heads"),
            ({"cache": object()}, r"cache: .* a paged cache"),
            ({"indices": torch.zeros(1)}, r"indices: .* sparse attention"),
            ({"output_attentions": True}, r"output_attentions: fastattn never forms"),
            ({"sliding_window": 6}, r"sliding_window=6 without an attention_mask for 7 keys"),
            ({"cu_seq_lens_q": torch.tensor([0, 2, 5, 7])}, r"cu_seq_lens_q packs 3 sequences"),
        ],
    )
    def test_arguments(self, device: str, kwargs: dict[str, Any], match: str) -> None:
        q, k, v = tensors(device, 7, 7)
        with pytest.raises(ValueError, match=match):
            attention_forward(module(), q, k, v, None, **kwargs)

    def test_the_same_arguments_when_they_say_nothing(self, device: str) -> None:
        q, k, v = tensors(device, 7, 7)
        expected, _ = attention_forward(module(), q, k, v, None)
        found, _ = attention_forward(
            module(), q, k, v, None, softcap=None, s_aux=None, output_attentions=False,
            sliding_window=7, position_ids=torch.arange(7), cu_seq_lens_q=torch.tensor([0, 7]),
        )  # fmt: skip
        assert torch.equal(found, expected)

    def test_additive_masks(self, device: str) -> None:
        q, k, v = tensors(device, 7, 7)
        with pytest.raises(ValueError, match=r"attention_mask is torch\.float32; .* pass `mask =="):
            attention_forward(module(), q, k, v, torch.zeros(2, 1, 7, 7, device=device))

    def test_more_queries_than_keys(self, device: str) -> None:
        q, k, v = tensors(device, 7, 5)
        with pytest.raises(ValueError, match="key has 5 positions, query 7"):
            attention_forward(module(), q, k, v, None)


def pair(cls: Any, config: Any, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model with "sdpa" and with "fastattn"."""
    torch.manual_seed(0)
    theirs = cls._from_config(config, attn_implementation="sdpa").to(device).eval()
    ours = cls._from_config(config, attn_implementation=NAME).to(device).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL)),
        # A window shorter than the text: it comes through the mask.
        (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6)),
    ],
    ids=["grouped heads", "sliding window"],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_other_families(
    cls: Any, config: Any, padding: int, tokens: torch.Tensor, device: str
) -> None:
    theirs, ours = pair(cls, config, device)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    found, expected = (m(tokens, attention_mask=mask).logits[mask.bool()] for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    generated, original = (
        m.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=9, pad_token_id=1)
        for m in (ours, theirs)
    )
    assert torch.equal(generated, original)


def test_a_family_that_needs_more_says_so(tokens: torch.Tensor, device: str) -> None:
    ours = Gemma2ForCausalLM._from_config(Gemma2Config(**SMALL), attn_implementation=NAME)
    with pytest.raises(ValueError, match="softcap: fastattn does not support"):
        ours.to(device)(tokens)


def test_gpt2_by_name(make_gpt2: Any, tokens: torch.Tensor) -> None:
    model = make_gpt2()
    expected = model(tokens).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    report = fastattn.accelerate(model)
    reason = {entry.name: entry.reason for entry in report.left}["transformer.h.0.attn"]
    assert reason == 'its config already says attn_implementation="fastattn"'
    fastattn.restore(model)
    assert model.config._attn_implementation == NAME
