"""GPT on packed sequences: the same losses and gradients as one by one, and nothing of each other.

Families: learned positions, or rotary ones with grouped heads, RMSNorm, a window and softcaps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import GPT, GPTConfig
from fastattn.models.packing import packed_positions
from fastattn.nn import PackedSequences

LENGTHS = [7, 1, 16, 5, 11]  # n_positions is 16, which the row of 40 tokens passes
CONFIGS: dict[str, dict[str, Any]] = {
    "learned": {},
    "llama": {
        "n_kv_head": 2,
        "norm": "rms_norm",
        "positions": "rotary",
        "gated": True,
        "activation_function": "silu",
        "qkv_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": 4,
        "layer_types": ("sliding_attention", "full_attention"),
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
    },
}


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest, device: str) -> GPT:
    torch.manual_seed(3)
    config = GPTConfig(
        vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        **CONFIGS[request.param],
    )  # fmt: skip
    return GPT(config, device=device)


def _documents(model: GPT) -> tuple[list[torch.Tensor], torch.Tensor, PackedSequences]:
    """Random documents, and the same as a row."""
    documents = [torch.randint(61, (1, n), device=model.device) for n in LENGTHS]
    starts = torch.tensor([0, *LENGTHS], device=model.device).cumsum(0)
    return documents, torch.cat(documents, 1), PackedSequences(starts, max(LENGTHS))


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("keep_logits", [True, False])
def test_it_equals_the_documents_one_by_one(model: GPT, keep_logits: bool) -> None:
    documents, row, packed = _documents(model)
    targets = torch.randint(61, row.shape, device=model.device)
    targets[:, ::3] = -100
    _, loss = model(row, targets, packed=packed, keep_logits=keep_logits)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    counted, total = int((targets != -100).sum()), 0.0
    for document, its in zip(documents, targets.split(LENGTHS, 1), strict=True):
        if (its != -100).any():  # else its mean is NaN
            one = model(document, its)[1] * (its != -100).sum() / counted
            one.backward()
            total += one.item()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        _close(got[name], parameter.grad)


def test_a_document_changes_nothing_of_another(model: GPT) -> None:
    _, row, packed = _documents(model)
    changed = row.clone()
    changed[:, :8] = (row[:, :8] + 1) % 61  # the first two documents
    with torch.no_grad():
        difference = model(changed, packed=packed) - model(row, packed=packed)
    assert not difference[:, 8:].any()
    assert difference[:, :8].abs().amin(1).all()


def test_positions_begin_again_with_empty_sequences_between(device: str) -> None:
    starts = torch.tensor([0, 0, 2, 2, 2, 3, 7, 7], device=device)
    assert packed_positions(starts, 7).tolist() == [0, 1, 0, 0, 1, 2, 3]


def test_no_logits_are_kept(model: GPT) -> None:
    tokens = torch.randint(61, (2, 9), device=model.device)
    logits, loss = model(tokens, tokens)
    nothing, same = model(tokens, tokens, keep_logits=False)
    assert nothing is None
    torch.testing.assert_close(same, loss)
    assert logits.shape == (2, 9, 61)


def test_a_head_with_a_hook_is_called(model: GPT) -> None:
    tokens = torch.randint(61, (1, 4), device=model.device)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0)
    nothing, loss = model(tokens, tokens, keep_logits=False)
    assert nothing is None
    assert loss.item() == pytest.approx(torch.tensor(61.0).log().item())


def _packed(*starts: int, longest: int = 4) -> PackedSequences:
    return PackedSequences(torch.tensor(starts), longest)


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [
        ((0, 6), TypeError, r"packed must be a fastattn.nn.PackedSequences.*got tuple"),
        (PackedSequences([0, 6], 6), TypeError, "cu_seqlens .* int32 or int64 tensor, got list"),
        (PackedSequences(torch.ones(3), 6), TypeError, "cu_seqlens .* got torch.float32"),
        (_packed(0), ValueError, r"cu_seqlens .* \(sequences \+ 1,\), got \(1,\)"),
        (_packed(0, 6, longest=17), ValueError, "at most n_positions = 16 .* max_seqlen = 17"),
        (_packed(0, 3), ValueError, "from 0 to the 6 tokens of input_ids, got 0 to 3"),
        (_packed(1, 3, 6), ValueError, "from 0 to the 6 tokens of input_ids, got 1 to 6"),
        (_packed(0, 1, 6), ValueError, "0 to max_seqlen = 4 tokens, got one of 5"),
        (_packed(0, 4, 3, 6), ValueError, "0 to max_seqlen = 4 tokens, got one of -1"),
    ],
)
def test_bad_packing(packed: Any, error: type[Exception], message: str) -> None:
    config = GPTConfig(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(error, match=message):
        GPT(config)(torch.zeros(1, 6).long(), packed=packed)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (2, {"packed": _packed(0, 3)}, r"shape \(1, tokens\), got \(2, 3\)"),
        (1, {"keep_logits": False}, "keep_logits=False needs targets"),
    ],
)
def test_what_excludes_each_other(rows: int, arguments: dict[str, Any], message: str) -> None:
    model = GPT(GPTConfig(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(rows, 3).long(), **arguments)
    with torch.no_grad(), pytest.raises(ValueError, match="packed and cache exclude each other"):
        model(torch.zeros(1, 3).long(), packed=_packed(0, 3), cache=model.new_cache(1, 4))
