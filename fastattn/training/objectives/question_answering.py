"""Extractive question answering: the span of a passage that answers (Rajpurkar et al. 2016).

A passage that is longer than the context is read in windows that overlap. A window that does not
hold the whole answer points at the token "cls" (Devlin et al. 2018, section 4.3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from fastattn.nn.checks import check_integer
from fastattn.training.contract import Batch, Example, Objective, Record, loss_of
from fastattn.training.evaluation import metrics
from fastattn.training.objectives import sequences
from fastattn.training.objectives.spans import Answer, Reading, best_spans, ranked

END = -1  # of a text among several; also the place of a token that is not of the passage


@dataclass(frozen=True)
class QuestionAnsweringSettings:
    """How a model that finds answers in passages is trained; records have SQuAD's fields.

    Attributes:
        question_field, context_field: of a record, the question and the passage.
        answers_field: of a record, {"text": [...], "answer_start": [...]}: texts of the passage,
            and at which character they begin. The first one is learned, all are right.
        context: most tokens of a window, special ones and the question too.
        overlap: how many tokens of the passage two neighbouring windows share. An answer that is
            not longer lies in one of them as a whole.
        longest_question: most tokens of a question; a longer one is cut.
        longest_answer: most tokens of an answer that is found.
        unanswerable: whether a passage may hold no answer (SQuAD 2.0): its lists are empty.
    """

    question_field: str = "question"
    context_field: str = "context"
    answers_field: str = "answers"
    context: int = 384
    overlap: int = 128
    longest_question: int = 64
    longest_answer: int = 30
    unanswerable: bool = False

    def __post_init__(self) -> None:
        for name, least in (("context", 1), ("overlap", 0), ("longest_question", 1)):
            check_integer(name, getattr(self, name), at_least=least)
        check_integer("longest_answer", self.longest_answer, at_least=1)


class QuestionAnswering(Objective):
    """Where in a passage the answer to a question begins and ends: an example for each window.

    Beside the model's inputs an example has what `measure` needs: `key`, by which the windows of a
    record find together; `first` and `last`, between which characters of the passage each token
    stands; `text`, the window's part of the passage as code points, and `origin`, where that
    begins; and `answers`, the right texts.
    """

    name = "question_answering"
    settings_class = QuestionAnsweringSettings
    fields = (
        "input_ids",
        "token_type_ids",
        "positions",
        "first",
        "last",
        "text",
        "origin",
        "answers",
        "key",
    )
    model_class = "EncoderForQuestionAnswering"
    auto_class = "AutoModelForQuestionAnswering"
    roles = ("cls", "sep", "pad")

    def _derive(self) -> None:
        tokenizer, settings = self.tokenizer, self.settings
        self._layout = tokenizer.layout(pair=True)
        before = self._layout.before[:, 0].tolist()
        if tokenizer.token("cls") not in before:
            raise ValueError("the tokenizer must begin a text with its 'cls' token, as BERT's does")
        self._cls = before.index(tokenizer.token("cls"))
        self._room = sequences.room(self._layout, settings.context)
        room = self._room - settings.longest_question
        if settings.overlap >= room:
            raise ValueError(
                f"overlap must be less than the {room} tokens of a passage for which a window has "
                f"room (context {settings.context}, longest_question "
                f"{settings.longest_question}); got {settings.overlap}"
            )

    def encode(self, record: Record) -> Iterable[Example]:
        question = self.text(record, self.settings.question_field)
        passage = self.text(record, self.settings.context_field)
        texts, start = self._answers(record, passage)
        digest = hashlib.sha256("\0".join([question, passage, *texts]).encode()).digest()
        beside = {
            "answers": numpy.array(
                [code for text in texts for code in (*_codes(text), END)], dtype=numpy.int64
            ),
            "key": numpy.frombuffer(digest[:8], "<u4").astype(numpy.int64) >> 1,  # int32's values
        }
        windows = list(self.windows(question, passage))
        held = [_held(window, texts[0], start) if texts else None for window in windows]
        self.truncated += bool(texts) and not any(held)  # too long for the overlap
        for window, positions in zip(windows, held):
            where = numpy.array(positions or [self._cls, self._cls])
            yield {**window, **beside, "positions": where}

    def windows(self, question: str, passage: str) -> Iterable[Example]:
        """The examples of a question without an answer, as a model that is trained is asked."""
        asked = self.tokenizer.encode(question, literal=True)
        ids, offsets, _ = self.tokenizer.words(passage, literal=True)
        for name, tokens in (("question", asked), ("passage", ids)):
            if not len(tokens):
                raise ValueError(f"the {name} has no token: give a text")
        asked = self.cut(asked, self.settings.longest_question, "longest_question")
        room, overlap = self._room - len(asked), self.settings.overlap
        before = len(self._layout.before) + len(asked) + len(self._layout.between)
        after = len(self._layout.after)
        for begin in range(0, max(len(ids) - overlap, 1), room - overlap):
            part = slice(begin, begin + room)
            places = numpy.pad(offsets[part], ((before, after), (0, 0)), constant_values=END)
            origin = int(offsets[part, 0].min())
            yield {
                **sequences.joined(self._layout, [asked, ids[part].tolist()]),
                "first": places[:, 0],
                "last": places[:, 1],
                "text": _codes(passage[origin : int(offsets[part, 1].max())]),
                "origin": numpy.array([origin]),
            }

    def collate(self, examples: Sequence[Example], random: numpy.random.Generator) -> Batch:
        positions = torch.tensor([example["positions"].tolist() for example in examples])
        targets = {"start_positions": positions[:, 0], "end_positions": positions[:, 1]}
        return sequences.batch_of(examples, self.tokenizer, targets, len(examples))

    def observe(self, model: torch.nn.Module, batch: Batch) -> Any:
        output = model(**batch.arguments)
        loss = loss_of(output).item() * batch.counted
        readings = zip(batch.examples, self._readings(batch, output, count=1))
        return (
            loss,
            batch.counted,
            [(example["key"].tolist(), _texts(example["answers"]), r) for example, r in readings],
        )

    def conclude(self, observed: Iterable[Any]) -> dict[str, float]:
        """ "loss" of the windows, "exact_match" and "f1" of the questions' answers (SQuAD's).

        Records that are equal in everything count once.
        """
        loss, windows = 0.0, 0
        read: dict[tuple[int, ...], list[Reading]] = {}  # by question
        accepted: dict[tuple[int, ...], list[str]] = {}
        for of_batch, counted, readings in observed:
            loss += of_batch
            windows += counted
            for numbers, texts, reading in readings:
                key = tuple(numbers)
                read.setdefault(key, []).append(reading)
                accepted[key] = texts
        if not read:
            raise ValueError("the validation data have no question")
        predictions = [ranked(read[key], self.settings.unanswerable)[0].text for key in accepted]
        references = list(accepted.values())
        return {
            "loss": loss / windows,
            "exact_match": metrics.exact_match(predictions, references),
            "f1": metrics.answer_f1(predictions, references),
        }

    @torch.no_grad()
    def answers(
        self,
        model: torch.nn.Module,
        question: str,
        passage: str,
        *,
        count: int = 1,
        batch_size: int = 16,
    ) -> list[Answer]:
        """The most probable answers to a question, best first; there may be fewer than `count`.

        Args:
            model: in eval mode, ours or transformers'.
            batch_size: how many windows the model reads at once.

        Raises:
            ValueError: the question or the passage has no token.
        """
        device = next(model.parameters()).device
        windows = list(self.windows(question, passage))
        read: list[Reading] = []
        for first in range(0, len(windows), batch_size):
            part = windows[first : first + batch_size]
            batch = sequences.batch_of(part, self.tokenizer, {}, 0).to(device)
            read += self._readings(batch, model(**batch.arguments), count)
        return ranked(read, self.settings.unanswerable)[:count]

    def _readings(self, batch: Batch, output: Any, count: int) -> Iterable[Reading]:
        """The answers that the model finds in each window of a batch."""
        starts, ends = (
            logits.float().cpu().numpy() for logits in (output.start_logits, output.end_logits)
        )
        for example, start, end in zip(batch.examples, starts, ends):
            first, last, origin = example["first"], example["last"], int(example["origin"][0])
            text = _text(example["text"])
            found = best_spans(
                start[: len(first)],
                end[: len(last)],
                last > first,  # a token of the passage, and of at least a character
                count=count,
                longest=self.settings.longest_answer,
            )
            answers = []
            for span in found:
                a, b = int(first[span.first]), int(last[span.last])
                piece = text[a - origin : b - origin]
                a += len(piece) - len(piece.lstrip())  # a token may have the space before it
                b -= len(piece) - len(piece.rstrip())
                answers.append(Answer(piece.strip(), a, max(a, b), span.score))
            yield Reading(answers, float(start[self._cls] + end[self._cls]))

    def _answers(self, record: Record, passage: str) -> tuple[list[str], int]:
        """The right texts, and where the first of them begins; 0 where there is none."""
        field = self.settings.answers_field
        given = self.value(record, field)
        given = given if isinstance(given, Mapping) else {}
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError(
                f'the field {field!r} of a record must be {{"text": [...], "answer_start": [...]}} '
                f"with lists of one length, got {record[field]!r}"
            )
        if not texts and not self.settings.unanswerable:
            raise ValueError(
                f"the field {field!r} of a record has no answer: give one, or set unanswerable"
            )
        for text, start in zip(texts, starts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"an answer must be a text that is not empty, got {text!r}")
            if not isinstance(start, int) or start < 0 or not passage.startswith(text, start):
                raise ValueError(
                    f"the passage does not have the answer {text!r} at character {start!r}, its "
                    "answer_start"
                )
        return texts, starts[0] if starts else 0


def _held(window: Example, text: str, start: int) -> list[int] | None:
    """The first and the last token of an answer; None if the window does not hold it all."""
    a = start + len(text) - len(text.lstrip())  # no token need have the spaces around it
    b = start + len(text.rstrip())
    origin = int(window["origin"][0])
    if a < origin or b > origin + len(window["text"]):
        return None
    tokens = numpy.flatnonzero((window["first"] < b) & (window["last"] > a))
    return [int(tokens[0]), int(tokens[-1])] if len(tokens) else None


def _codes(text: str) -> numpy.ndarray:
    """A text as its code points."""
    return numpy.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(numpy.int64)


def _text(codes: numpy.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")


def _texts(codes: numpy.ndarray) -> list[str]:
    """The texts that end with END each."""
    ends = numpy.flatnonzero(codes == END)
    return [_text(codes[begin + 1 : end]) for begin, end in zip([-1, *ends], ends)]
