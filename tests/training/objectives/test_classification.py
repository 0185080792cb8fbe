"""Classes of texts: the example, the batch, the figures, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fastattn import models
from fastattn.training import Tokenizer
from fastattn.training.contract import Batch
from fastattn.training.objectives import Classification, sequences
from fastattn.training.objectives.classification import ClassificationSettings

LABELS = ("bad", "fair", "good")
RANDOM = numpy.random.default_rng(0)


def _objective(tokenizer: Tokenizer, **settings: Any) -> Classification:
    return Classification(tokenizer, ClassificationSettings(labels=LABELS, **settings))


def test_an_example_is_what_the_tokenizer_of_the_model_makes(word_pieces: Tokenizer) -> None:
    objective = _objective(word_pieces)
    (example,) = objective.encode({"text": "The quick fox jumps", "label": "good"})
    assert example["input_ids"].tolist() == [2, 5, 6, 8, 9, 10, 3]  # [CLS] ... jump ##s [SEP]
    assert example["token_type_ids"].tolist() == [0] * 7
    assert example["label"].tolist() == [2]


def test_a_pair_has_types_where_the_tokenizer_has_them(
    word_pieces: Tokenizer, byte_level: Tokenizer
) -> None:
    record = {"text": "the fox", "other": "the dog", "label": 0}
    (example,) = _objective(word_pieces, pair_field="other").encode(record)
    assert example["input_ids"].tolist() == [2, 5, 8, 3, 5, 13, 3]
    assert example["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    objective = _objective(byte_level, pair_field="other")
    (example,) = objective.encode(record)
    text = byte_level.decode(example["input_ids"].tolist())
    assert text == "<|cls|>the fox<|sep|>the dog<|sep|>"
    batch = objective.collate([example], RANDOM)
    assert "token_type_ids" not in batch.arguments  # all are 0: any encoder takes the batch


def test_the_longer_text_loses_first() -> None:
    for first in range(9):
        for second in range(9):
            for room in range(1, 17):
                a, b = first, second
                while a + b > room:
                    a, b = (a - 1, b) if a > b else (a, b - 1)
                assert sequences.fitting(first, second, room) == (a, b)


def test_what_is_cut_is_counted(byte_level: Tokenizer) -> None:
    objective = _objective(byte_level, context=6)
    (example,) = objective.encode({"text": "fox " * 2, "label": 0})
    assert objective.truncated == 0
    with pytest.warns(UserWarning, match="context"):
        (example,) = objective.encode({"text": "fox " * 40, "label": 0})
    assert len(example["input_ids"]) == 6 and objective.truncated == 1
    assert example["input_ids"][-1] == byte_level.token("sep")


def test_the_name_of_a_special_token_in_a_text_is_text(byte_level: Tokenizer) -> None:
    (example,) = _objective(byte_level).encode({"text": "a<|sep|>b", "label": 0})
    special = [i for i in example["input_ids"].tolist() if i in byte_level.special_ids]
    assert special == [byte_level.token("cls"), byte_level.token("sep")]
    assert byte_level.decode(example["input_ids"].tolist()) == "<|cls|>a<|sep|>b<|sep|>"


def _model(pooler: bool, size: int) -> models.EncoderForSequenceClassification:
    torch.manual_seed(0)
    config = models.EncoderConfig(
        vocab_size=size, n_positions=24, n_embd=16, n_layer=2, n_head=2, n_labels=3,
        pooler=pooler, pooling="cls" if pooler else "mean", initializer_range=0.5,
        label_names=LABELS,
    )  # fmt: skip
    return models.EncoderForSequenceClassification(config).eval()


@pytest.mark.parametrize("pooler", [True, False], ids=["pooler", "mean"])
def test_measures_are_those_of_each_text_by_itself(byte_level: Tokenizer, pooler: bool) -> None:
    objective = _objective(byte_level)
    model = _model(pooler, byte_level.vocab_size)
    texts = ["fox", "the quick dog, lazy", "天气很好", "jumps over", "1990s fox", "北京"]
    numbers = [0, 2, 1, 1, 0, 2]
    examples = [
        example
        for text, number in zip(texts, numbers)
        for example in objective.encode({"text": text, "label": LABELS[number]})
    ]
    losses, given = [], []
    with torch.no_grad():
        for example, number in zip(examples, numbers):
            logits, _ = model(torch.from_numpy(example["input_ids"])[None])
            losses.append(-logits.double().log_softmax(-1)[0, number].item())
            given.append(int(logits.argmax()))
        batches = [objective.collate(examples[:4], RANDOM), objective.collate(examples[4:], RANDOM)]
        measured = objective.measure(model, batches)
    right = [a == b for a, b in zip(given, numbers)]
    assert 0 < sum(right) < 6  # else the figures say little
    f1 = []
    for number in range(3):
        both = sum(a == b == number for a, b in zip(given, numbers))
        f1.append(2 * both / (given.count(number) + numbers.count(number)))
    expected = {
        "loss": numpy.mean(losses),
        "accuracy": numpy.mean(right),
        "macro_f1": numpy.mean(f1),
    }
    assert measured == pytest.approx(expected, rel=1e-5)
    assert batches[0].counted == 4 and batches[0].tokens == sum(
        len(example["input_ids"]) for example in examples[:4]
    )


def test_a_model_of_transformers_measures_the_same(word_pieces: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = _model(True, word_pieces.vocab_size)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert [theirs.config.id2label[number] for number in range(3)] == list(LABELS)
    settings = ClassificationSettings(labels=LABELS, pair_field="other")
    measured = []
    for network, interface in ((model, "fastattn"), (theirs, "transformers")):
        objective = Classification(word_pieces, settings, interface)  # type: ignore[arg-type]
        examples = [
            example
            for text, other, label in [("the fox", "dog", 0), ("lazy", "北京 the dog", 2)]
            for example in objective.encode({"text": text, "other": other, "label": label})
        ]
        with torch.no_grad():
            measured.append(objective.measure(network, [objective.collate(examples, RANDOM)]))
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


@pytest.mark.parametrize("label", ["Good", 3, -1, 1.0, True, None, ["good"]])
def test_a_label_that_is_none_is_refused(byte_level: Tokenizer, label: object) -> None:
    with pytest.raises(ValueError, match=r"'label'.*'bad', 'fair', 'good'.*0 to 2; got") as error:
        list(_objective(byte_level).encode({"text": "a", "label": label}))
    assert repr(label) in str(error.value)


def test_records_and_settings_that_do_not_fit_are_refused(byte_level: Tokenizer) -> None:
    objective = _objective(byte_level)
    with pytest.raises(ValueError, match="no field 'label'; fields: text"):
        list(objective.encode({"text": "a"}))
    with pytest.raises(ValueError, match=r"'text'.*must be a text, got int"):
        list(objective.encode({"text": 1, "label": 0}))
    with pytest.raises(ValueError, match="'text' of a record has no token: ''"):
        list(objective.encode({"text": "", "label": 0}))
    for labels in ((), ("a",), ("a", "a")):
        with pytest.raises(ValueError, match="labels must list the classes"):
            Classification(byte_level, ClassificationSettings(labels=labels))
    with pytest.raises(TypeError, match="labels must be a list of names, got 'ab'"):
        Classification(byte_level, ClassificationSettings(labels="ab"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than the 2 special tokens"):
        _objective(byte_level, context=2)
    plain = Tokenizer.train(["text"], 300)
    with pytest.raises(ValueError, match="puts a token between two texts"):
        _objective(plain, pair_field="other")
    with pytest.raises(ValueError, match="validation data have no example"):
        objective.measure(torch.nn.Linear(1, 1), iter(list[Batch]()))
