"""`fastattn evaluate`: each kind of model on a file, against its definition, at any batch size."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import models
from fastattn.cli import main
from fastattn.training import Tokenizer
from fastattn.training.evaluation.perplexity import perplexity

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "it", "rains"]
SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
BATCH_SIZES = (1, 3, 8)

Scores = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    special = {role: f"<|{role}|>" for role in ("cls", "sep", "pad", "mask")}
    return Tokenizer.train([" ".join(WORDS) * 3], 300, special_tokens=special)


@pytest.fixture
def evaluate(
    tmp_path: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., dict[str, float]]:
    """A model, its data and options to the scores that are printed."""

    def run(model: Any, records: list[dict[str, Any]], *options: str) -> dict[str, float]:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save(tmp_path / "model")
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, records)))
        capsys.readouterr()
        argv = ["evaluate", str(tmp_path / "model"), *options, "--data", str(data), "--json"]
        assert main([*argv]) == 0
        return json.loads(capsys.readouterr().out)["scores"]

    return run


def alike(evaluate: Scores, model: Any, records: list[dict[str, Any]], *options: str) -> Any:
    """The scores, which are the same at each batch size."""
    first, *others = [
        evaluate(model, records, *options, "--batch-size", str(size)) for size in BATCH_SIZES
    ]
    for scores in others:
        assert scores == pytest.approx(first, rel=1e-5)
    return first


def sentence(draw: random.Random, longest: int = 9) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))


def encoder(cls: Any, tokenizer: Tokenizer, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = models.EncoderConfig(
        vocab_size=tokenizer.vocab_size, n_positions=48, pad_token_id=tokenizer.token("pad"),
        **SIZES, **settings,
    )  # fmt: skip
    return cls(config).eval()


def gpt(tokenizer: Tokenizer) -> models.GPT:
    torch.manual_seed(0)
    end, size = tokenizer.end_of_text, tokenizer.vocab_size
    tokens = {"vocab_size": size, "bos_token_id": end, "eos_token_id": end}
    return models.GPT(models.GPTConfig(n_positions=16, **tokens, **SIZES))


def test_a_language_model(evaluate: Scores, tokenizer: Tokenizer) -> None:
    model, draw = gpt(tokenizer), random.Random(0)
    texts = [sentence(draw, 30) for _ in range(7)]
    records = [{"review": text} for text in texts]
    scores = alike(evaluate, model, records, "field=review")
    found = perplexity(model, tokenizer, texts)
    assert scores["perplexity"] == pytest.approx(found.perplexity, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-5)
    assert scores["tokens"] == found.tokens
    wide = evaluate(model, records, "field=review", "--context", "8", "--stride", "8")
    assert wide["perplexity"] != scores["perplexity"]


def test_a_classifier(evaluate: Scores, tokenizer: Tokenizer) -> None:
    model = encoder(
        models.EncoderForSequenceClassification, tokenizer, n_labels=3, label_names=("a", "b", "c")
    )
    draw = random.Random(0)
    records = [{"text": sentence(draw), "label": draw.choice("abc")} for _ in range(11)]
    scores = alike(evaluate, model, records)
    right = 0
    for record in records:
        ids = [tokenizer.token("cls"), *tokenizer.encode(record["text"]), tokenizer.token("sep")]
        right += "abc"[model(torch.tensor([ids])).logits.argmax()] == record["label"]
    assert 0 < right < 11
    assert scores["accuracy"] == pytest.approx(right / 11)
    assert evaluate(model, records, "--metric", "accuracy") == {"accuracy": scores["accuracy"]}


def test_a_tagger_of_words(evaluate: Scores, tokenizer: Tokenizer) -> None:
    tags = ("O", "B-x", "I-x")
    model = encoder(models.EncoderForTokenClassification, tokenizer, n_labels=3, label_names=tags)
    draw = random.Random(0)
    words = [sentence(draw).split() for _ in range(10)]
    records = [{"tokens": row, "tags": draw.choices(tags, k=len(row))} for row in words]
    assert 0 < alike(evaluate, model, records)["accuracy"] < 1


def test_answers_in_passages(evaluate: Scores, tokenizer: Tokenizer) -> None:
    """Some passages need several windows."""
    model = encoder(models.EncoderForQuestionAnswering, tokenizer)
    draw = random.Random(0)
    records = []
    for _ in range(9):
        passage = sentence(draw, 60)
        start = draw.choice([0, *(i + 1 for i, c in enumerate(passage) if c == " ")])
        answer = passage[start:].split(" ")[0]
        records.append(
            {
                "question": sentence(draw),
                "context": passage,
                "answers": {"text": [answer], "answer_start": [start]},
            }
        )
    scores = alike(evaluate, model, records, "longest_question=12", "overlap=8")
    assert 0 < scores["f1"] < 1


def test_a_translator(evaluate: Scores, tokenizer: Tokenizer) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    torch.manual_seed(0)
    pad, end = tokenizer.token("pad"), tokenizer.end_of_text
    model = models.EncoderDecoder(
        models.EncoderDecoderConfig(
            vocab_size=tokenizer.vocab_size, n_positions=64, d_model=32, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, frozen_padding=True, logits_bias=True,
            initializer_range=0.3, pad_token_id=pad, eos_token_id=end, decoder_start_token_id=pad,
        )
    ).eval()  # fmt: skip
    draw = random.Random(0)
    sources = [sentence(draw) for _ in range(9)]
    written = []
    for source in sources:
        ids = [tokenizer.token("cls"), *tokenizer.encode(source), end]
        out = model.generate([ids], num_beams=3, max_new_tokens=12)[0].tolist()
        written.append(tokenizer.decode([i for i in out if i not in tokenizer.special_ids]).strip())
    assert len(set(written)) > 3
    references = [f"{text} the {sentence(draw)}" for text in written]
    records = [{"en": source, "zh": text} for source, text in zip(sources, references)]
    options = ("source=en", "target=zh", "--beams", "3", "--max-new-tokens", "12")
    scores = alike(evaluate, model, records, *options)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [references]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(written, [references]).score)


def test_a_table(tmp_path: Path, chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox\n\n今天天气很好\n")
    argv = ["evaluate", str(chat_folder), "--data", str(tmp_path), "--documents", "paragraph"]
    assert main(argv) == 0
    count, *rows = capsys.readouterr().out.splitlines()
    assert count == "2 records"
    names = ["perplexity", "bits_per_byte", "nats_per_token", "tokens"]
    assert [row.split()[0] for row in rows] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "bleu"], "--metric 'bleu' is none of this model's: perplexity, bits"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["fild=x"], "[objective] has no key 'fild': did you mean 'field'?"),
        (["field=x"], "text.txt: a record has no field 'x'; fields: text"),
        (["--context", "1000"], "context must be at most the model's 96 positions, got 1000"),
    ],
)
def test_a_users_error_is_a_line(
    options: list[str], message: str, tmp_path: Path, chat_folder: Path, refused: Any
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox")
    argv = ["evaluate", str(chat_folder), *options, "--data", str(tmp_path / "text.txt")]
    refused(argv, message)


def test_a_masked_language_model(evaluate: Scores, tokenizer: Tokenizer) -> None:
    """Each token in turn, hidden by hand."""
    model = encoder(models.EncoderForMaskedLM, tokenizer)
    draw = random.Random(0)
    texts = [sentence(draw, 12) for _ in range(4)]
    scores = alike(evaluate, model, [{"text": text} for text in texts])
    cls, sep, mask = map(tokenizer.token, ("cls", "sep", "mask"))
    surprises = []
    for text in texts:
        ids = torch.tensor([cls, *tokenizer.encode(text), sep])
        for place in range(1, len(ids) - 1):
            hidden = ids.clone()
            hidden[place] = mask
            logits = model.double()(hidden[None]).logits[0, place]
            surprises.append(-logits.log_softmax(-1)[ids[place]].item())
    assert scores["tokens"] == len(surprises)
    expected = math.exp(sum(surprises) / len(surprises))
    assert scores["pseudo_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_models_of_transformers(evaluate: Scores, tokenizer: Tokenizer) -> None:
    """The same folder, read by either library."""
    draw = random.Random(1)
    texts = [{"text": sentence(draw, 30)} for _ in range(3)]
    names = {"n_labels": 2, "label_names": ("a", "b")}
    classifier = encoder(models.EncoderForSequenceClassification, tokenizer, **names)
    labelled = [{**record, "label": draw.choice("ab")} for record in texts]
    for model, records in ((gpt(tokenizer), texts), (classifier, labelled)):
        ours = evaluate(model, records)
        theirs = evaluate(model, records, "--library", "transformers")
        assert theirs == pytest.approx(ours, rel=1e-5)


def test_a_class_without_a_measure(tmp_path: Path, tokenizer: Tokenizer, refused: Any) -> None:
    encoder(models.Encoder, tokenizer).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "data.txt").write_text("a fox")
    for library, words in (("fastattn", "no measure for a Encoder"), ("transformers", "BertModel")):
        argv = ["evaluate", str(tmp_path), "--data", str(tmp_path / "data.txt")]
        refused([*argv, "--library", library], words)
