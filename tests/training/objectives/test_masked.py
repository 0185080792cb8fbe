"""Masked tokens: how many, which, what becomes of them, and the loss of both libraries' models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers

from fastattn.models import EncoderForMaskedLM
from fastattn.training import Tokenizer
from fastattn.training.contract import Batch, Example
from fastattn.training.objectives import Masked
from fastattn.training.objectives.masked import MaskedSettings

TEXT = "The unbelievable fox, don't jump over dogs 123. 我喜欢编程，天气很好。 カタカナ 𠀀𠀁 "
ROLES = {"mask": "<mask>", "cls": "<cls>", "sep": "<sep>", "pad": "<pad>"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], 290, special_tokens=ROLES)


def _objective(tokenizer: Tokenizer, **settings: Any) -> Masked:
    return Masked(tokenizer, MaskedSettings(**settings))


def _collated(objective: Masked, examples: list[Example], seed: int = 0) -> Batch:
    return objective.collate(examples, numpy.random.default_rng(seed))


def _ordinary(tokenizer: Tokenizer, count: int, seed: int = 1) -> list[int]:
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    return numpy.random.default_rng(seed).choice(ids, count).tolist()


@pytest.mark.parametrize("probability", [0.15, 0.4])
@pytest.mark.parametrize("whole_words", [False, True])
def test_shares(tokenizer: Tokenizer, probability: float, whole_words: bool) -> None:
    objective = _objective(tokenizer, probability=probability, whole_words=whole_words)
    n, random = 60000, numpy.random.default_rng(2)
    ids = numpy.array(_ordinary(tokenizer, n))
    starts = (random.random(n) < 0.5).astype(numpy.uint8) if whole_words else numpy.ones(n)
    starts[0] = 1
    batch = _collated(objective, [{"input_ids": ids, "starts": starts.astype(numpy.uint8)}])
    inputs, labels = batch.arguments["input_ids"][0].numpy(), batch.arguments["labels"][0].numpy()
    chosen = labels != -100
    assert (labels[chosen] == ids[chosen]).all() and (inputs[~chosen] == ids[~chosen]).all()
    assert batch.counted == chosen.sum() and batch.tokens == n

    def holds(count: int, of: int, share: float, spread: float = 1.0) -> None:
        """Within 4.5 standard deviations: a false alarm in 150,000 runs."""
        assert abs(count - of * share) < 4.5 * spread * (of * share * (1 - share)) ** 0.5

    # Words are of 1 / 0.5 tokens, geometric: the variance of a sum over them is 3 times as large.
    holds(chosen.sum(), n, probability, spread=3**0.5 if whole_words else 1.0)
    here = inputs[chosen]
    others = (here != tokenizer.token("mask")) & (here != labels[chosen])
    holds((here == tokenizer.token("mask")).sum(), len(here), 0.8)
    same_by_chance = 1 / (tokenizer.vocab_size - len(tokenizer.special_ids))
    holds(others.sum(), len(here), 0.1 * (1 - same_by_chance))
    assert not set(here[others]) & tokenizer.special_ids
    assert len(set(here[others])) > 0.9 / same_by_chance  # of all tokens


def test_special_tokens_are_never_chosen(tokenizer: Tokenizer) -> None:
    objective = _objective(tokenizer, probability=1.0)
    examples = list(objective.encode({"text": "a<sep>fox<|endoftext|><mask>b"}))
    ids = examples[0]["input_ids"]
    special = numpy.isin(ids, sorted(tokenizer.special_ids))
    assert special.sum() == 5  # with those around
    for seed in range(20):
        batch = _collated(objective, examples, seed)
        assert ((batch.arguments["labels"][0] == -100).numpy() == special).all()
        assert (batch.arguments["input_ids"][0].numpy()[special] == ids[special]).all()
    assert not list(objective.encode({"text": "<sep><|endoftext|>"}))  # nothing to choose
    assert not list(objective.encode({"text": ""}))


def test_one_target_at_least(tokenizer: Tokenizer) -> None:
    objective = _objective(tokenizer, probability=1e-9)
    examples = [*objective.encode({"text": "fox"}), *objective.encode({"text": "a dog"})]
    places = set()
    for seed in range(40):
        batch = _collated(objective, examples, seed)
        assert batch.counted == 1
        places.add(int((batch.arguments["labels"] != -100).flatten().nonzero()))
    assert len(places) == sum(len(example["input_ids"]) - 2 for example in examples)


def test_chosen_again_by_the_generator(tokenizer: Tokenizer) -> None:
    objective = _objective(tokenizer)
    examples = list(objective.encode({"text": TEXT}))
    first, same, other = (_collated(objective, examples, seed).arguments for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["labels"], other["labels"])


def _defined_words(text: str) -> set[int]:
    """Where words begin: of GPT-2's splitting, and at each character of Chinese and Japanese."""
    pieces = re.finditer(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+", text)
    starts = {piece.start() for piece in pieces}
    for place, character in enumerate(text):
        if re.match(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]", character):
            starts |= {place, place + 1}
    return starts


def test_words_are_whole(tokenizer: Tokenizer) -> None:
    objective = _objective(tokenizer, whole_words=True, context=200)
    (example,) = objective.encode({"text": TEXT})
    ids, offsets, _ = tokenizer.words(TEXT)
    assert example["input_ids"].tolist() == [
        tokenizer.token("cls"), *ids, tokenizer.token("sep")
    ]  # fmt: skip
    begins = _defined_words(TEXT)
    before = 0
    for (start, end), starts in zip(offsets.tolist(), example["starts"][1:-1], strict=True):
        # Tokens that share a character are of one word.
        assert starts == (start in begins and start >= before), TEXT[start:]
        before = end
    word = example["starts"].cumsum()
    several = 0
    for seed in range(30):
        chosen = _collated(objective, [example], seed).arguments["labels"][0].numpy() != -100
        for number in set(word[chosen]):
            assert chosen[word == number].all()
            several += (word == number).sum() > 1
    assert several


@pytest.mark.parametrize("roles", [ROLES, {"mask": "<mask>"}])
@pytest.mark.parametrize("whole_words", [False, True])
def test_blocks(roles: dict[str, str], whole_words: bool) -> None:
    tokenizer = Tokenizer.train([TEXT], 280, special_tokens=roles)
    objective = _objective(tokenizer, context=7, whole_words=whole_words)
    around = len(roles) > 1
    blocks = list(objective.encode({"text": TEXT}))
    joined: list[int] = []
    for block in blocks:
        ids = block["input_ids"].tolist()
        if around:
            assert (ids[0], ids[-1]) == (tokenizer.token("cls"), tokenizer.token("sep"))
            ids = ids[1:-1]
        assert block["starts"][int(around)] == 1
        assert len(block["starts"]) == len(block["input_ids"]) <= 7
        joined += ids
    assert joined == tokenizer.encode(TEXT)
    assert len(blocks) == -(-len(joined) // (5 if around else 7))


def _bert(tokenizer: Tokenizer) -> transformers.BertForMaskedLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(
        vocab_size=tokenizer.vocab_size, intermediate_size=48, initializer_range=0.2,
        pad_token_id=tokenizer.token("pad"), **sizes, **none,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def test_the_loss_of_both_libraries(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = _bert(tokenizer)
    theirs.save_pretrained(tmp_path)
    ours = EncoderForMaskedLM.from_pretrained(tmp_path)
    objective = _objective(tokenizer, probability=0.3, context=20)
    examples = [
        example for text in (TEXT, "a fox", "我") for example in objective.encode({"text": text})
    ]
    batch = _collated(objective, examples)
    arguments = dict(batch.arguments)
    labels = arguments.pop("labels")
    assert (labels != -100).sum() == batch.counted > 5
    logits = theirs(**arguments).logits.double()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    for model in (ours, theirs):
        assert objective.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert objective.measure(ours, [batch])["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_a_mask_token() -> None:
    with pytest.raises(ValueError, match="the tokenizer has no 'mask' token"):
        Masked(Tokenizer.train(["a"], 257))
