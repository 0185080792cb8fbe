"""Tags of words: which tokens have them, and the figures of spans."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
import pytest
import torch

from fastattn import models
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training import Tokenizer
from fastattn.training.objectives import TokenClassification
from fastattn.training.objectives.token_classification import TokenClassificationSettings

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
RANDOM = numpy.random.default_rng(0)


def _objective(tokenizer: Tokenizer, **settings: Any) -> TokenClassification:
    return TokenClassification(tokenizer, TokenClassificationSettings(labels=LABELS, **settings))


def _record(text: str) -> dict[str, list[str]]:
    pairs = [pair.split("/") for pair in text.split()]
    return {"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]}


@pytest.mark.parametrize("separator", [" ", ""])
def test_the_first_token_of_each_word_has_its_tag(byte_level: Tokenizer, separator: str) -> None:
    draw = numpy.random.default_rng(0)
    vocabulary = ["The", "quickest", "foxes", "天气", "很", "好", "é", "x-y", "北京,", "<|sep|>"]
    for _ in range(30):
        words = draw.choice(vocabulary, draw.integers(1, 12)).tolist()
        tags = draw.choice(LABELS, len(words)).tolist()
        (example,) = _objective(byte_level, separator=separator).encode(
            {"tokens": words, "tags": tags}
        )
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        assert (ids[0], ids[-1]) == (byte_level.token("cls"), byte_level.token("sep"))
        assert labels[0] == labels[-1] == IGNORED
        starts = [place for place, label in enumerate(labels) if label != IGNORED]
        assert [LABELS[labels[place]] for place in starts] == tags
        pieces = [
            byte_level.decode(ids[begin:end]) for begin, end in zip(starts, [*starts[1:], -1])
        ]
        assert pieces == [words[0], *(separator + word for word in words[1:])]


def test_a_word_that_the_normaliser_removes_keeps_its_tag(word_pieces: Tokenizer) -> None:
    (example,) = _objective(word_pieces).encode(
        {"tokens": ["the", "\u200b", "fox"], "tags": ["O", "B-PER", 2]}
    )
    unknown = word_pieces.token("unk")
    assert example["input_ids"].tolist() == [2, 5, unknown, 8, 3]
    assert example["labels"].tolist() == [IGNORED, 0, 1, 2, IGNORED]


def test_what_is_cut_is_counted(byte_level: Tokenizer) -> None:
    objective = _objective(byte_level, context=7)
    with pytest.warns(UserWarning, match="context"):
        (example,) = objective.encode({"tokens": ["fox"] * 9, "tags": ["O"] * 9})
    assert len(example["input_ids"]) == len(example["labels"]) == 7
    assert objective.truncated == 1 and example["labels"][-1] == IGNORED


class _Output(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor


class _Fixed(torch.nn.Module):
    """Gives each token with a label the tag that is next in a list."""

    def __init__(self, tags: list[str]) -> None:
        super().__init__()
        self.tags = iter(tags)

    def forward(self, labels: torch.Tensor, **_: torch.Tensor) -> _Output:
        logits = torch.randn(*labels.shape, len(LABELS))
        for row, place in (labels != IGNORED).nonzero().tolist():
            logits[row, place, LABELS.index(next(self.tags))] = 100.0
        return _Output(logits, torch.tensor(0.5 * len(labels)))


def test_measures_that_are_worked_out(byte_level: Tokenizer) -> None:
    objective = _objective(byte_level)
    records = [
        _record("Jim/B-PER Kirk/I-PER of/O Iowa/B-LOC"),
        _record("in/O 北京/B-LOC"),
        _record("Ann/B-PER"),
    ]
    examples = [example for record in records for example in objective.encode(record)]
    batches = [objective.collate(examples[:2], RANDOM), objective.collate(examples[2:], RANDOM)]
    assert [batch.counted for batch in batches] == [6, 1]
    model = _Fixed(["B-PER", "O", "O", "B-LOC", "I-LOC", "I-LOC", "B-LOC"])
    # Predicted: PER 0, LOC 3; LOC 0-1; LOC 0. Only Iowa is right, of 4 predicted and 4 wanted.
    expected = {"loss": (6 * 1.0 + 1 * 0.5) / 7, "accuracy": 3 / 7}
    spans = {"precision": 1 / 4, "recall": 1 / 4, "f1": 1 / 4}
    assert objective.measure(model, batches) == pytest.approx(expected | spans)


def test_the_loss_is_the_mean_over_words(byte_level: Tokenizer) -> None:
    torch.manual_seed(0)
    config = models.EncoderConfig(
        vocab_size=byte_level.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2,
        n_labels=len(LABELS), initializer_range=0.5,
    )  # fmt: skip
    model = models.EncoderForTokenClassification(config).eval()
    objective = _objective(byte_level)
    records = [_record("Jim/B-PER quickest/O"), _record("lazy/I-LOC foxes/O 1990s/B-LOC")]
    examples = [example for record in records for example in objective.encode(record)]
    losses = []
    with torch.no_grad():
        for example in examples:
            logits, _ = model(torch.from_numpy(example["input_ids"])[None])
            table = logits.double().log_softmax(-1)[0]
            labels = example["labels"].tolist()
            losses += [-table[i, label].item() for i, label in enumerate(labels) if label >= 0]
        loss = objective.loss(model, objective.collate(examples, RANDOM)).item()
    assert len(losses) == 5
    assert loss == pytest.approx(numpy.mean(losses), rel=1e-5)


def test_records_and_settings_that_do_not_fit_are_refused(byte_level: Tokenizer) -> None:
    objective = _objective(byte_level)
    with pytest.raises(ValueError, match=r"one of 'O', 'B-PER'.*got 'B-ORG'"):
        list(objective.encode(_record("Jim/B-ORG")))
    with pytest.raises(ValueError, match=r"0 to 4; got 5"):
        list(objective.encode({"tokens": ["a"], "tags": [5]}))
    with pytest.raises(ValueError, match="2 words in 'tokens' and 1 tags in 'tags'"):
        list(objective.encode({"tokens": ["a", "b"], "tags": ["O"]}))
    for words in ("ab", [], None):
        with pytest.raises(ValueError, match="'tokens' of a record must be a list"):
            list(objective.encode({"tokens": words, "tags": ["O"]}))
    for word in ("", " ", 1):
        with pytest.raises(ValueError, match=f"must hold words, got {word!r}"):
            list(objective.encode({"tokens": [word], "tags": ["O"]}))
    with pytest.raises(ValueError, match="IOB2"):
        TokenClassification(byte_level, TokenClassificationSettings(labels=("NOUN", "VERB")))
    with pytest.raises(ValueError, match="no example"):
        objective.measure(torch.nn.Linear(1, 1), [])
