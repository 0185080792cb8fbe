"""From the logits of where an answer begins and ends to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy


class Span(NamedTuple):
    """A span of tokens, both ends in it, and the sum of its ends' logits."""

    score: float
    first: int
    last: int


class Answer(NamedTuple):
    """A text of the passage, its first character and the one after its last, and its score.

    The score is the sum of the logits of both ends. "" is the answer that there is none.
    """

    text: str
    start: int
    end: int
    score: float


class Reading(NamedTuple):
    """The answers that a model finds in a window, and the score of none being there."""

    answers: Sequence[Answer]
    nothing: float


def best_spans(
    start_logits: numpy.ndarray,
    end_logits: numpy.ndarray,
    allowed: numpy.ndarray,
    *,
    count: int = 1,
    longest: int = 30,
) -> list[Span]:
    """The spans with the largest score, best first; fewer than `count` if there are not so many.

    The score of a span is start_logits[first] + end_logits[last] (Devlin et al. 2018, section 4.2).

    Args:
        start_logits, end_logits: (T,).
        allowed: (T,) boolean: tokens that may be an end of the span.
        count: how many spans.
        longest: most tokens of a span.
    """
    places = numpy.flatnonzero(allowed)
    start, end = start_logits[places].astype(float), end_logits[places].astype(float)
    first = numpy.arange(len(places))[:, None]
    last = first + numpy.arange(min(longest, len(places)))  # (n, longest) of the places
    inside = last < len(places)
    last = numpy.minimum(last, len(places) - 1)
    inside &= places[last] - places[first] < longest
    scores = numpy.where(inside, start[first] + end[last], -numpy.inf).ravel()
    order = numpy.argsort(-scores, kind="stable")[:count]
    return [
        Span(
            float(scores[index]), int(places[index // last.shape[1]]), int(places[last.flat[index]])
        )
        for index in order
        if scores[index] > -numpy.inf
    ]


def ranked(readings: Sequence[Reading], unanswerable: bool) -> list[Answer]:
    """The answers of all windows of a question, best first, each once; at least one.

    Args:
        readings: of each window, at least one.
        unanswerable: whether "" is among them: that there is no answer, with the score of the
            window that says so with the smallest one.
    """
    answers = [answer for reading in readings for answer in reading.answers if answer.text]
    if unanswerable or not answers:
        answers.append(Answer("", 0, 0, min(reading.nothing for reading in readings)))
    answers.sort(key=lambda answer: -answer.score)
    unique: dict[tuple[int, int], Answer] = {}
    for answer in answers:
        unique.setdefault((answer.start, answer.end), answer)
    return list(unique.values())
