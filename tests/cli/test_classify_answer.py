"""`fastattn classify` and `fastattn answer`: what they print, and what they refuse."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import models
from fastattn.cli import main
from fastattn.training import Tokenizer

ROLES = {role: f"<|{role}|>" for role in ("cls", "sep", "pad")}
PASSAGE = "The quick brown fox jumps.\nOver the lazy dog, 今天天气很好。 " * 6


def _folder(path: Path, cls: Any, **config: Any) -> Path:
    tokenizer = Tokenizer.train(
        ["the quick brown fox 今天天气很好 " * 20], 300, special_tokens=ROLES
    )
    torch.manual_seed(0)
    sizes = {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    model = cls(models.EncoderConfig(vocab_size=tokenizer.vocab_size, **sizes, **config))
    model.save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"n_labels": 3, "label_names": ("bad", "fair", "good")}
    path = tmp_path_factory.mktemp("classifier")
    return _folder(path, models.EncoderForSequenceClassification, **names)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("reader"), models.EncoderForQuestionAnswering)


def _expected(folder: Path, text: str) -> str:
    """By the plain definition: cls, the text, sep; softmax."""
    model, tokenizer = models.load(folder).eval(), Tokenizer.load(folder)
    ids = [tokenizer.token("cls"), *tokenizer.encode(text), tokenizer.token("sep")]
    with torch.no_grad():
        row = model(torch.tensor([ids])).logits.double().softmax(-1)[0]
    best = int(row.argmax())
    return f"{('bad', 'fair', 'good')[best]}\t{row[best]:.4f}\t{' '.join(text.split())}\n"


def test_classify_prints_class_and_probability(
    classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["我喜欢编程", "the quick\nfox", "lazy " * 2]
    expected = "".join(_expected(classifier, text) for text in texts)
    assert main(["classify", str(classifier), *texts]) == 0
    assert capsys.readouterr().out == expected
    lines = ["fox"] * 40 + ["今天"]  # more than a batch
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(lines) + "\n"))
    assert main(["classify", str(classifier), "-"]) == 0
    out = capsys.readouterr().out
    assert out == _expected(classifier, "fox") * 40 + _expected(classifier, "今天")


def test_answer_prints_texts_of_the_passage(
    reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "passage.txt"
    file.write_text(PASSAGE, encoding="utf-8")
    argv = ["answer", str(reader), "--context", str(file), "--count", "3", "who?", "天气"]
    assert main(argv) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6
    for text, _, place in rows:
        start, end = map(int, place.split("-"))
        assert text == " ".join(PASSAGE[start:end].split()) and text
    for question in (rows[:3], rows[3:]):
        scores = [float(score) for _, score, _ in question]
        assert scores == sorted(scores, reverse=True)
    assert rows[:3] != rows[3:]


def test_answer_says_where_there_is_none(
    reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folder = tmp_path / "reader"
    model, tokenizer = models.load(reader), Tokenizer.load(reader)
    with torch.no_grad():  # each state is that of its own token, and only cls has one
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.encoder.wte.weight[tokenizer.token("cls"), 0] = 9.0
        model.spans.weight[:, 0] = 5.0
    model.save_pretrained(folder)
    tokenizer.save(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(PASSAGE))
    assert main(["answer", str(folder), "--context", "-", "--unanswerable", "who?"]) == 0
    assert capsys.readouterr().out.startswith("-\t")


def test_what_does_not_fit_is_refused(
    classifier: Path, reader: Path, tmp_path: Path, refused: Any
) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    regression = _folder(tmp_path / "r", models.EncoderForSequenceClassification, n_labels=1)
    cases = [
        (["classify", str(tmp_path / "none"), "a"], "there is no folder"),
        (["classify", str(reader), "a"], "takes the class EncoderForSequenceClassification;"),
        (["classify", str(classifier), ""], "has no token"),
        (["classify", str(regression), "a"], "n_labels 1"),
        (["answer", str(classifier), "--context", str(binary), "a"], "no text in UTF-8"),
        (["answer", str(reader), "--context", str(tmp_path / "none"), "a"], "No such file"),
        (["answer", str(reader), "--context", "x", "--count", "0", "a"], "--count must be"),
    ]
    for argv, message in cases:
        refused(argv, message)
