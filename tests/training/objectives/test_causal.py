"""Packed documents for ours and for accelerated models of transformers: losses and gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers

import fastattn
from fastattn.training import Tokenizer
from fastattn.training.contract import Example, Interface
from fastattn.training.objectives import Causal

VOCAB = 301
LENGTHS = [9, 1, 23, 2, 16]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox, 我喜欢编程。" * 20], 300)


def _examples(lengths: list[int], seed: int = 0) -> list[Example]:
    random = numpy.random.default_rng(seed)
    return [{"input_ids": random.integers(VOCAB, size=n).astype(numpy.uint16)} for n in lengths]


def _model(kind: str) -> tuple[torch.nn.Module, Interface]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.2}
    if kind == "ours":
        config = fastattn.GPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=23, **sizes)
        return fastattn.GPT(config), "fastattn"
    if kind == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 23}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        theirs: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**small, **dropout, **tokens, **sizes)
        )
    else:
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **heads, **sizes))
    fastattn.accelerate(theirs)
    return theirs, "transformers"


def _one_by_one(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """The mean over all tokens but the first of each document, of plain logits."""
    total, counted = torch.zeros(()), 0
    for example in examples:
        ids = torch.from_numpy(example["input_ids"].astype(numpy.int64))
        output = model(ids.unsqueeze(0))
        logits = getattr(output, "logits", output)[0]
        total = total + F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        counted += len(ids) - 1
    return total / counted


@pytest.mark.parametrize("kind", ["ours", "gpt2", "llama"])
def test_a_row_is_its_documents_one_by_one(tokenizer: Tokenizer, kind: str) -> None:
    model, interface = _model(kind)
    objective, examples = Causal(tokenizer, interface=interface), _examples(LENGTHS)
    batch = objective.collate(examples, numpy.random.default_rng(0))
    assert (batch.counted, batch.tokens) == (sum(LENGTHS) - len(LENGTHS), sum(LENGTHS))
    loss = objective.loss(model, batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = _one_by_one(model, examples)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        error = (got[name] - parameter.grad).abs().max()
        assert error <= 1e-5 * parameter.grad.abs().max(), name


def test_the_arguments_are_those_of_transformers_collator(tokenizer: Tokenizer) -> None:
    examples = _examples(LENGTHS)
    got = Causal(tokenizer, interface="transformers").collate(examples, numpy.random.default_rng(0))
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = [{"input_ids": example["input_ids"].tolist()} for example in examples]
    expected = collator(rows, return_tensors="pt")
    # With a cache transformers does not look for sequences in a row, and lets them see each other.
    assert got.arguments.keys() == {*expected, "use_cache"} and not got.arguments["use_cache"]
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got.arguments[name], value)
        else:
            assert got.arguments[name] == value


def test_a_piece_of_one_token_has_no_target(tokenizer: Tokenizer) -> None:
    batch = Causal(tokenizer).collate(_examples([1, 1]), numpy.random.default_rng(0))
    assert batch.counted == 0
    with pytest.raises(ValueError, match="no target that counts"):
        Causal(tokenizer).measure(_model("ours")[0], [batch])


def test_perplexity_is_of_the_mean_over_all_targets(tokenizer: Tokenizer) -> None:
    model, _ = _model("ours")
    objective = Causal(tokenizer)
    parts = [_examples([5, 9], seed=1), _examples([1], seed=2), _examples([20], seed=3)]
    random = numpy.random.default_rng(0)
    with torch.no_grad():
        got = objective.measure(model, [objective.collate(part, random) for part in parts])
        expected = _one_by_one(model, [*itertools.chain(*parts)]).item()
    assert got == pytest.approx({"loss": expected, "perplexity": math.exp(expected)}, rel=1e-5)


def test_a_document_ends_with_the_end_of_text(tokenizer: Tokenizer) -> None:
    objective = Causal(tokenizer)
    (example,) = objective.encode({"text": "我喜欢 fox"})
    assert example["input_ids"].tolist() == [*tokenizer.encode("我喜欢 fox"), tokenizer.end_of_text]
    with pytest.raises(ValueError, match=r"a record has no field 'text'; fields: body"):
        list(objective.encode({"body": "x"}))
