"""Figures of merit from predictions and references, without a model.

All are shares from 0 to 1, except those of a text's probability and `bleu` and `chrf`, which are
from 0 to 100, as papers have them.
"""

from __future__ import annotations

import math
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy
import numpy.typing

from fastattn.training.optional import require

ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = frozenset(string.punctuation)


class SpanScores(NamedTuple):
    """How many of the predicted spans are right, how many of the right ones are predicted."""

    precision: float
    recall: float
    f1: float


def accuracy(predictions: numpy.typing.ArrayLike, references: numpy.typing.ArrayLike) -> float:
    """The share of `predictions` that equal their references.

    Args:
        predictions, references: (n,) classes, by number or by name; n is at least 1.

    Raises:
        TypeError: one has numbers and the other names.
        ValueError: the shapes do not fit.
    """
    given, wanted = _classes(predictions, references)
    return float(numpy.mean(given == wanted))


def f1(predictions: numpy.typing.ArrayLike, references: numpy.typing.ArrayLike) -> float:
    """The macro F1: the mean of 2 TP / (2 TP + FP + FN) over the classes that occur in either.

    Of the counts of all classes together, F1 is `accuracy`, since every sequence has one class.
    Arguments and errors are those of `accuracy`.
    """
    given, wanted = _classes(predictions, references)
    names, numbers = numpy.unique(numpy.concatenate([given, wanted]), return_inverse=True)
    predicted = numpy.bincount(numbers[: len(given)], minlength=len(names))
    actual = numpy.bincount(numbers[len(given) :], minlength=len(names))
    right = numpy.bincount(numbers[: len(given)][given == wanted], minlength=len(names))
    return float(numpy.mean(2 * right / (predicted + actual)))  # no class has 0 + 0


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans in a sequence of IOB2 tags: (type, first, last), as seqeval reads them.

    "B-x" begins a span of type x and "I-x" goes on with one. An "I-x" that follows neither "B-x"
    nor "I-x" begins one as well: models write such, and CoNLL's script has always counted them.

    Raises:
        ValueError: a tag is not "O", "B-..." or "I-...".
    """
    found: list[tuple[str, int, int]] = []
    open_type: str | None = None  # of the span that the tag before belongs to
    for index, tag in enumerate(tags):
        if tag == "O":
            open_type = None
            continue
        prefix, _, kind = tag.partition("-")
        if prefix not in ("B", "I") or not kind:
            raise ValueError(f'a tag must be "O", "B-type" or "I-type" (IOB2), got {tag!r}')
        if prefix == "I" and kind == open_type:
            found[-1] = (kind, found[-1][1], index)
        else:
            found.append((kind, index, index))
        open_type = kind
    return found


def span_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> SpanScores:
    """Precision, recall and F1 of the spans of all sequences together (CoNLL-2003, seqeval).

    A span is right if type, first and last tag are. A score without a denominator is 0.

    Args:
        predictions, references: a list of IOB2 tags for each sequence.

    Raises:
        ValueError: the lengths differ, or a tag is not IOB2's.
    """
    _same_length(predictions, references)
    predicted = actual = right = 0
    for index, (given, wanted) in enumerate(zip(predictions, references)):
        if len(given) != len(wanted):
            raise ValueError(
                f"predictions[{index}] has {len(given)} tags and references[{index}] {len(wanted)}"
            )
        theirs, ours = set(spans(given)), set(spans(wanted))
        predicted, actual = predicted + len(theirs), actual + len(ours)
        right += len(theirs & ours)
    return SpanScores(
        precision=right / predicted if predicted else 0.0,
        recall=right / actual if actual else 0.0,
        f1=2 * right / (predicted + actual) if predicted + actual else 0.0,
    )


def answer_tokens(text: str) -> list[str]:
    """The part of an answer that is compared (Rajpurkar et al. 2016, arXiv:1606.05250).

    Lower case, without punctuation and the English articles, split at white space. Chinese
    characters are tokens of their own, as in CMRC 2018 and MLQA, since no space separates words.
    """
    split: list[str] = []
    for character in text.lower():
        if character in PUNCTUATION or unicodedata.category(character).startswith("P"):
            continue
        split.append(f" {character} " if _is_han(character) else character)
    return [token for token in "".join(split).split() if token not in ARTICLES]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers that equal one of their references, compared as `answer_tokens`.

    Args:
        predictions: an answer to each question, "" for none.
        references: the right answers of each question; none for a question without an answer.

    Raises:
        TypeError: `references` holds texts, not lists of texts.
        ValueError: the lengths differ, or there is no question.
    """
    return _mean_of_best(predictions, references, lambda given, wanted: float(given == wanted))


def answer_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean F1 of the answers' tokens, for each question with the reference that fits best.

    Arguments and errors are those of `exact_match`. Where an answer or a reference has no token,
    F1 is 1 if both have none, else 0 (SQuAD 2.0).
    """
    return _mean_of_best(predictions, references, _overlap)


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean loss: of how many equally probable tokens the model seems to choose.

    Args:
        nats: the sum of the tokens' negative log-probabilities.
        tokens: how many, at least 1.
    """
    _at_least_1("tokens", tokens)
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, size: int) -> float:
    """How many bits a model needs for a byte of a text, a measure that no tokenizer changes.

    Args:
        nats: the sum of the negative log-probabilities of all of the text's tokens.
        size: how many bytes the text has in UTF-8, at least 1.
    """
    _at_least_1("size", size)
    return nats / math.log(2) / size


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "13a"
) -> float:
    """BLEU of a corpus, from 0 to 100, as sacrebleu computes it (Post 2018, arXiv:1804.08771).

    Args:
        predictions: a translation of each sentence.
        references: the right translations of each sentence, of all the same number.
        tokenize: sacrebleu's: "13a", or "zh" for translations into Chinese.

    Raises:
        TypeError: `references` holds texts, not lists of texts.
        ValueError: the lengths differ, or there is no sentence.
        ImportError: sacrebleu is not installed.
    """
    sacrebleu = require("sacrebleu", "evaluate", "BLEU")
    streams = _streams(predictions, references)
    return float(sacrebleu.corpus_bleu(list(predictions), streams, tokenize=tokenize).score)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 of a corpus, from 0 to 100 (Popovic 2015): F-score of character n-grams.

    Arguments and errors are those of `bleu`; characters need no tokenizer.
    """
    sacrebleu = require("sacrebleu", "evaluate", "chrF")
    streams = _streams(predictions, references)
    return float(sacrebleu.corpus_chrf(list(predictions), streams).score)


def _classes(
    predictions: numpy.typing.ArrayLike, references: numpy.typing.ArrayLike
) -> tuple[numpy.ndarray, numpy.ndarray]:
    given, wanted = numpy.asarray(predictions), numpy.asarray(references)
    if given.ndim != 1 or given.shape != wanted.shape or not given.size:
        raise ValueError(
            "predictions and references must be one-dimensional, of one length and not empty, got "
            f"the shapes {given.shape} and {wanted.shape}"
        )
    if (given.dtype.kind == "U") != (wanted.dtype.kind == "U"):
        raise TypeError(
            "predictions and references must both be numbers or both be names, got "
            f"{given.dtype} and {wanted.dtype}"
        )
    return given, wanted


def _same_length(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            "predictions and references must be of one length and not empty, got "
            f"{len(predictions)} and {len(references)}"
        )


def _check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _same_length(predictions, references)
    if any(isinstance(accepted, str) for accepted in references):
        raise TypeError(
            "references must hold a list of texts for each prediction, got texts: "
            "pass [[text], ...]"
        )


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: there is no text")


def _mean_of_best(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    score: Callable[[list[str], list[str]], float],
) -> float:
    _check_texts(predictions, references)
    total = 0.0
    for given, accepted in zip(predictions, references):
        tokens = answer_tokens(given)
        total += max(score(tokens, answer_tokens(text)) for text in accepted or ("",))
    return total / len(predictions)


def _overlap(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


def _is_han(character: str) -> bool:
    """Whether it is a Chinese character, of the basic plane or beyond it."""
    return unicodedata.name(character, "").startswith("CJK ")


def _streams(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[Iterable[str]]:
    """The references as sacrebleu wants them: all first ones, all second ones, ..."""
    _check_texts(predictions, references)
    counts = {len(accepted) for accepted in references}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "references must have the same number of translations, at least 1, for each sentence, "
            f"got {', '.join(map(str, sorted(counts)))}"
        )
    return [list(stream) for stream in zip(*references)]
