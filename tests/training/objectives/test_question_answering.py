"""Spans of passages: windows, positions, decoding, the figures."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
import pytest
import torch

from fastattn import models
from fastattn.training import Tokenizer
from fastattn.training.contract import Example
from fastattn.training.objectives import QuestionAnswering
from fastattn.training.objectives.question_answering import QuestionAnsweringSettings
from fastattn.training.objectives.spans import best_spans

RANDOM = numpy.random.default_rng(0)
WORDS = ["The", "quick", "fox,", "1990s.", "天气很好", "北京", "é", "lazy", "<|sep|>", "(dog)"]


def _objective(tokenizer: Tokenizer, **settings: Any) -> QuestionAnswering:
    small = {"context": 40, "overlap": 8, "longest_question": 6}
    return QuestionAnswering(tokenizer, QuestionAnsweringSettings(**{**small, **settings}))


def _record(
    passage: str, *answers: str, question: str = "the fox?", start: int | None = None
) -> dict[str, Any]:
    starts = [passage.index(answer) if start is None else start for answer in answers]
    answered = {"text": list(answers), "answer_start": starts}
    return {"question": question, "context": passage, "answers": answered}


def _passage(draw: numpy.random.Generator, count: int) -> str:
    return " ".join(draw.choice(WORDS, count).tolist())


def _cut_out(example: Example, passage: str, first: int, last: int) -> str:
    return passage[example["first"][first] : example["last"][last]]


def test_windows_cover_the_passage_and_overlap(byte_level: Tokenizer) -> None:
    draw = numpy.random.default_rng(0)
    objective = _objective(byte_level)
    asked = byte_level.encode("the fox?", literal=True)
    assert len(asked) <= 6
    for count in (1, 5, 20, 60):
        passage = _passage(draw, count)
        tokens = byte_level.encode(passage, literal=True)
        read: list[int] = []
        for example in objective.encode(_record(passage, passage[0])):
            ids = example["input_ids"].tolist()
            begin = 2 + len(asked)
            assert ids[1 : begin - 1] == asked and len(ids) <= 40
            part = ids[begin:-1]
            assert not read or read[-8:] == part[:8]
            read = read[:-8] + part if read else part
            inside = example["first"] >= 0
            assert inside.tolist() == [False] * begin + [True] * len(part) + [False]
            text = bytes(example["text"].astype("<u4").tobytes()).decode("utf-32-le")
            assert passage[example["origin"][0] :].startswith(text)
        assert read == tokens


@pytest.mark.parametrize("count", [1, 22, 23, 60])
def test_windows_are_those_of_transformers(
    word_pieces: Tokenizer, tmp_path: Any, count: int
) -> None:
    transformers = pytest.importorskip("transformers")
    word_pieces.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    question = "the fox?"
    passage = " ".join(numpy.random.default_rng(count).choice(["fox", "北", "dog"], count))
    objective = _objective(word_pieces, context=28, overlap=5)
    got = list(objective.windows(question, passage))
    expected = theirs(
        question, passage, truncation="only_second", max_length=28, stride=5,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    assert [window["input_ids"].tolist() for window in got] == expected["input_ids"]
    assert [window["token_type_ids"].tolist() for window in got] == expected["token_type_ids"]
    for index, window in enumerate(got):
        inside = [number == 1 for number in expected.sequence_ids(index)]
        places = numpy.array(expected["offset_mapping"][index])[inside]
        assert window["first"][inside].tolist() == places[:, 0].tolist()
        assert window["last"][inside].tolist() == places[:, 1].tolist()


def test_a_window_has_the_whole_answer_or_points_at_cls(byte_level: Tokenizer) -> None:
    draw = numpy.random.default_rng(1)
    objective = _objective(byte_level)
    seen = {True: 0, False: 0}
    for _ in range(40):
        words = draw.choice(WORDS, 30).tolist()
        first = int(draw.integers(30))
        before, answer = " ".join(words[:first]), words[first]
        passage = " ".join(words)
        start = len(before) + (first > 0)
        found = 0
        for example in objective.encode(_record(passage, answer, start=start)):
            origin = int(example["origin"][0])
            holds = origin <= start and start + len(answer) <= origin + len(example["text"])
            a, b = example["positions"].tolist()
            seen[holds] += 1
            if holds:
                # A token may have the space before the word.
                assert _cut_out(example, passage, a, b).strip() == answer
                found += 1
            else:
                assert (a, b) == (0, 0) and example["input_ids"][0] == byte_level.token("cls")
        assert found
    assert min(seen.values()) > 20 and objective.truncated == 0


def test_an_answer_that_is_longer_than_the_overlap_is_counted(byte_level: Tokenizer) -> None:
    passage = "quick lazy fox jumps over the 1990s dog " * 4
    objective = _objective(byte_level, overlap=0)
    room = 40 - 3 - len(byte_level.encode("the fox?"))
    offsets = byte_level.words(passage).offsets
    first, last = int(offsets[room - 1, 0]), int(offsets[room, 1])  # on the border of two windows
    examples = list(objective.encode(_record(passage, passage[first:last], start=first)))
    assert objective.truncated == 1
    assert all(example["positions"].tolist() == [0, 0] for example in examples)


def test_best_spans_are_those_of_all_spans() -> None:
    draw = numpy.random.default_rng(0)
    for _ in range(30):
        length = int(draw.integers(1, 14))
        start, end = draw.normal(size=(2, length))
        allowed = draw.random(length) < 0.7
        longest, count = int(draw.integers(1, 6)), int(draw.integers(1, 9))
        every = sorted(
            (
                (start[a] + end[b], a, b)
                for a in range(length)
                for b in range(a, min(a + longest, length))
                if allowed[a] and allowed[b]
            ),
            reverse=True,
        )
        found = best_spans(start, end, allowed, count=count, longest=longest)
        assert found == every[:count]


class _Output(NamedTuple):
    start_logits: torch.Tensor
    end_logits: torch.Tensor
    loss: torch.Tensor


class _Oracle(torch.nn.Module):
    """Says where the answer is; with an offset it is wrong at the end."""

    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset

    def forward(
        self, input_ids: torch.Tensor, start_positions: Any, end_positions: Any, **_: Any
    ) -> _Output:
        start, end = torch.zeros(2, *input_ids.shape).unbind()
        rows = torch.arange(len(input_ids))
        start[rows, start_positions] = end[rows, end_positions + self.offset] = 9.0
        return _Output(start, end, torch.tensor(2.0))


def _measured(
    objective: QuestionAnswering, model: torch.nn.Module, records: list[Any], size: int
) -> dict[str, float]:
    examples = [example for record in records for example in objective.encode(record)]
    assert len(examples) > len(records)  # some are of several windows
    batches = [
        objective.collate(examples[i : i + size], RANDOM) for i in range(0, len(examples), size)
    ]
    return objective.measure(model, batches)


RECORDS = [
    _record("The quick fox jumps over the lazy dog. " * 9 + "It was in the 1990s.", "the 1990s"),
    _record("北京是中国的首都，天气很好。", "中国", "北京"),
    _record("A lazy dog", "lazy dog", question="什么？"),
]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_model_that_knows_has_all_answers(word_pieces: Tokenizer, size: int) -> None:
    measured = _measured(_objective(word_pieces), _Oracle(), RECORDS, size)
    assert measured == {"loss": 2, "exact_match": 1, "f1": 1}


def test_an_answer_that_is_too_short_is_partly_right(word_pieces: Tokenizer) -> None:
    records = [
        _record("the quick brown fox jumps over the lazy dog " * 6 + "in 1990", "quick brown fox"),
    ]
    measured = _measured(_objective(word_pieces), _Oracle(-1), records, 2)
    assert measured["exact_match"] == 0
    assert measured["f1"] == pytest.approx(2 * 2 / (2 + 3))  # "quick brown"


def test_no_answer_is_one_where_all_windows_say_so(word_pieces: Tokenizer) -> None:
    nothing = {**_record("One lazy dog " * 30), "question": "why?"}
    with pytest.raises(ValueError, match="has no answer: give one, or set unanswerable"):
        list(_objective(word_pieces).encode(nothing))
    objective = _objective(word_pieces, unanswerable=True)
    measured = _measured(objective, _Oracle(), [*RECORDS, nothing], 4)
    assert measured == {"loss": 2, "exact_match": 1, "f1": 1}
    # Without the setting the best span is the answer, whatever cls says.
    examples = list(objective.encode(nothing))
    plain = _objective(word_pieces)
    assert plain.measure(_Oracle(), [plain.collate(examples, RANDOM)])["exact_match"] == 0


def _model(size: int) -> models.EncoderForQuestionAnswering:
    torch.manual_seed(0)
    config = models.EncoderConfig(
        vocab_size=size, n_positions=40, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5
    )
    return models.EncoderForQuestionAnswering(config).eval()


def test_answers_are_the_best_spans_of_all_windows(byte_level: Tokenizer) -> None:
    model = _model(byte_level.vocab_size)
    objective = _objective(byte_level, longest_answer=4)
    passage = _passage(numpy.random.default_rng(3), 40)
    every: dict[tuple[int, int], float] = {}
    with torch.no_grad():
        for window in objective.windows("why?", passage):
            start, end, _ = model(torch.from_numpy(window["input_ids"])[None])
            places = numpy.flatnonzero(window["first"] >= 0)
            for a in places:
                for b in places[(places >= a) & (places < a + 4)]:
                    low, high = int(window["first"][a]), int(window["last"][b])
                    piece = passage[low:high]
                    key = high - len(piece.lstrip()), low + len(piece.rstrip())
                    score = (start[0, a] + end[0, b]).item()
                    if piece.strip():
                        every[key] = max(score, every.get(key, -1e9))
    expected = sorted(every.items(), key=lambda item: -item[1])[:5]
    for batch_size in (1, 16):
        found = objective.answers(model, "why?", passage, count=5, batch_size=batch_size)
        assert [answer.score for answer in found] == pytest.approx(
            [s for _, s in expected], abs=1e-4
        )
        assert [(answer.start, answer.end) for answer in found] == [key for key, _ in expected]
        assert all(answer.text == passage[answer.start : answer.end] for answer in found)


def test_a_question_that_is_too_long_is_cut_and_counted(byte_level: Tokenizer) -> None:
    objective = _objective(byte_level)
    with pytest.warns(UserWarning, match="longest_question"):
        (example,) = objective.encode(_record("A dog", "dog", question="why " * 30))
    assert objective.truncated == 1
    assert example["input_ids"].tolist().index(byte_level.token("sep")) == 1 + 6


def test_records_and_settings_that_do_not_fit_are_refused(byte_level: Tokenizer) -> None:
    objective = _objective(byte_level)
    good = _record("A dog", "dog")
    for answers in (None, "dog", {}, {"text": ["dog"]}, {"text": ["dog"], "answer_start": []}):
        with pytest.raises(ValueError, match="'answers' of a record must be"):
            list(objective.encode({**good, "answers": answers}))
    for start in (1, -3, 99, "2"):
        with pytest.raises(ValueError, match=f"'dog' at character {start!r}"):
            list(objective.encode(_record("A dog", "dog", start=start)))
    with pytest.raises(ValueError, match="an answer must be a text that is not empty"):
        list(objective.encode(_record("A dog", " ")))
    with pytest.raises(ValueError, match="the passage has no token"):
        list(objective.windows("why?", ""))
    with pytest.raises(ValueError, match="the question has no token"):
        list(objective.windows("", "A dog"))
    with pytest.raises(ValueError, match=r"less than the 31 tokens.*got 31"):
        _objective(byte_level, overlap=31)
    with pytest.raises(ValueError, match="longest_answer must be at least 1, got 0"):
        _objective(byte_level, longest_answer=0)
    with pytest.raises(TypeError, match="context must be an integer, got '40'"):
        _objective(byte_level, context="40")
    with pytest.raises(ValueError, match="no 'cls' token"):
        _objective(Tokenizer.train(["text"], 300))
    with pytest.raises(ValueError, match="no question"):
        objective.measure(_Oracle(), [])
