"""Pairs of texts: what is read and written, what is cut, and the loss of both libraries' models."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers

from fastattn.models import EncoderDecoder, EncoderDecoderConfig
from fastattn.training import Tokenizer
from fastattn.training.contract import Batch
from fastattn.training.objectives import SequenceToSequence
from fastattn.training.objectives.sequence_to_sequence import SequenceToSequenceSettings

PAIRS = [
    {"source": "I like to write programs", "target": "我喜欢编程"},
    {"source": "fox", "target": "狐狸"},
    {"source": "", "target": ""},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [text for pair in PAIRS for text in pair.values()]
    return Tokenizer.train(texts, 280, special_tokens={"pad": "<pad>", "eos": "</s>"})


def _collated(objective: SequenceToSequence, records: list[Any]) -> Batch:
    examples = [example for record in records for example in objective.encode(record)]
    return objective.collate(examples, numpy.random.default_rng(0))


@pytest.mark.parametrize("cls", [None, "<s>"])
def test_what_is_read_and_written(cls: str | None) -> None:
    roles = {"pad": "<pad>", "eos": "</s>"} | ({} if cls is None else {"cls": cls})
    tokenizer = Tokenizer.train(["fox"], 280, special_tokens=roles)
    settings = SequenceToSequenceSettings(source="en", target="zh", prefix="translate: ")
    (example,) = SequenceToSequence(tokenizer, settings).encode({"en": "fox", "zh": "狐狸"})
    before = [] if cls is None else [tokenizer.token("cls")]
    end = tokenizer.token("eos")
    encode = tokenizer.encode
    assert example["input_ids"].tolist() == [*before, *encode("translate: fox"), end]
    assert example["targets"].tolist() == [*before, *encode("狐狸"), end]


def test_what_is_cut_is_counted_and_said_once(tokenizer: Tokenizer) -> None:
    settings = SequenceToSequenceSettings(max_source_length=5, max_target_length=7)
    objective = SequenceToSequence(tokenizer, settings)
    source, target = "source " * 9, "目标" * 9
    with pytest.warns(UserWarning, match=r"a text of \d+ tokens is cut to 4, .* max_source_length"):
        (example,) = objective.encode({"source": source, "target": target})
    end = tokenizer.token("eos")
    assert example["input_ids"].tolist() == [*tokenizer.encode(source)[:4], end]
    assert example["targets"].tolist() == [*tokenizer.encode(target)[:6], end]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(objective.encode({"source": source, "target": "a"}))
        assert objective.truncated == 3
        list(objective.encode({"source": "a", "target": "a"}))
    assert objective.truncated == 3


def test_padding(tokenizer: Tokenizer) -> None:
    objective = SequenceToSequence(tokenizer)
    examples = [example for pair in PAIRS for example in objective.encode(pair)]
    batch = _collated(objective, PAIRS)
    for name, value in (("input_ids", tokenizer.token("pad")), ("targets", -100)):
        rows = [example[name].tolist() for example in examples]
        width = max(map(len, rows))
        assert batch.arguments[name].tolist() == [[*r, *[value] * (width - len(r))] for r in rows]
    lengths = [len(example["input_ids"]) for example in examples]
    mask = batch.arguments["attention_mask"]
    assert mask.tolist() == [[int(i < n) for i in range(max(lengths))] for n in lengths]
    assert batch.counted == sum(len(example["targets"]) for example in examples)
    assert batch.tokens == batch.counted + sum(lengths)
    assert "attention_mask" not in _collated(objective, PAIRS[:1]).arguments


def _model(tokenizer: Tokenizer) -> EncoderDecoder:
    torch.manual_seed(0)
    config = EncoderDecoderConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, dropout=0.0, pad_token_id=tokenizer.token("pad"),
        eos_token_id=tokenizer.token("eos"), decoder_start_token_id=tokenizer.token("pad"),
    )  # fmt: skip
    return EncoderDecoder(config)


def test_a_batch_is_its_pairs_one_by_one(tokenizer: Tokenizer) -> None:
    model, objective = _model(tokenizer), SequenceToSequence(tokenizer)
    total, counted = torch.zeros(()), 0
    for pair in PAIRS:
        (example,) = objective.encode(pair)
        source, target = (torch.from_numpy(example[name])[None] for name in objective.fields)
        so_far = F.pad(target[:, :-1], (1, 0), value=tokenizer.token("pad"))
        logits = model(source, so_far)
        assert isinstance(logits, torch.Tensor)
        total = total + F.cross_entropy(logits[0], target[0], reduction="sum")
        counted += target.numel()
    (total / counted).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = objective.loss(model, _collated(objective, PAIRS))
    loss.backward()
    mean = total.item() / counted
    assert loss.item() == pytest.approx(mean, rel=1e-5)
    for name, gradient in expected.items():
        error = (model.get_parameter(name).grad - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), name
    batches = [_collated(objective, [pair]) for pair in PAIRS]
    with torch.no_grad():
        measured = objective.measure(model, batches)
    assert measured == pytest.approx({"loss": mean, "perplexity": math.exp(mean)}, rel=1e-5)


def test_a_model_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, dropout=0.0, max_position_embeddings=64, init_std=0.3,
        pad_token_id=tokenizer.token("pad"), eos_token_id=tokenizer.token("eos"),
        decoder_start_token_id=tokenizer.token("pad"),
    )  # fmt: skip
    theirs = transformers.MarianMTModel(config)
    theirs.save_pretrained(tmp_path)
    ours = EncoderDecoder.from_pretrained(tmp_path)
    objectives = [SequenceToSequence(tokenizer, interface=i) for i in ("fastattn", "transformers")]
    got, expected = (
        objective.loss(model, _collated(objective, PAIRS)).item()
        for objective, model in zip(objectives, (ours, theirs), strict=True)
    )
    assert got == pytest.approx(expected, rel=1e-5)
