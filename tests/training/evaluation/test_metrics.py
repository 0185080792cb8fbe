"""Metrics against cases worked out by hand and definitions written out a second time."""

from __future__ import annotations

import math

import pytest

from fastattn.training.evaluation import metrics


def test_accuracy_and_f1_of_a_confusion_that_is_worked_out() -> None:
    references = ["a", "a", "a", "b", "b", "c"]
    predictions = ["a", "a", "b", "b", "c", "d"]
    # F1: a 2*2/(2+3), b 2*1/(2+2), c 0/(1+1), d 0/(1+0)
    assert metrics.accuracy(predictions, references) == 3 / 6
    assert metrics.f1(predictions, references) == pytest.approx((4 / 5 + 2 / 4) / 4)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-P I-P O B-L", [("P", 0, 1), ("L", 3, 3)]),
        ("B-P B-P I-P", [("P", 0, 0), ("P", 1, 2)]),  # two neighbours of one type
        ("I-P I-P O", [("P", 0, 1)]),  # a span without its beginning
        ("B-P I-L I-L I-P", [("P", 0, 0), ("L", 1, 2), ("P", 3, 3)]),  # the type changes
        ("B-a-b I-a-b I-a", [("a-b", 0, 1), ("a", 2, 2)]),  # a type with a hyphen
    ],
)
def test_spans(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert metrics.spans(tags.split()) == expected


def test_span_scores_that_are_worked_out() -> None:
    references = [["B-P", "I-P", "O", "B-L"], ["O", "B-P"], ["B-L"]]
    predictions = [["B-P", "O", "O", "B-L"], ["B-P", "I-P"], ["B-P"]]
    # 4 spans are right ones, 4 are predicted, of which only the first sentence's L is right.
    assert metrics.span_scores(predictions, references) == (1 / 4, 1 / 4, 1 / 4)
    assert metrics.span_scores(references, references) == (1, 1, 1)
    assert metrics.span_scores([["O"]], [["B-P"]]) == (0, 0, 0)
    assert metrics.span_scores([["O"]], [["O"]]) == (0, 0, 0)


def test_a_span_never_crosses_from_one_sequence_into_the_next() -> None:
    assert metrics.span_scores([["B-P"], ["I-P"]], [["B-P"], ["O"]]) == (
        1 / 2,
        1,
        pytest.approx(2 / 3),
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The  Quick, brown\tFox!", ["quick", "brown", "fox"]),
        ("an A+ from the cat's theory", ["from", "cats", "theory"]),
        ("《红楼梦》，1791年", ["红", "楼", "梦", "1791", "年"]),
        ("GPT-2模型", ["gpt2", "模", "型"]),
        ("𠀀b", ["𠀀", "b"]),  # a character beyond the basic plane
        ("「…」?", []),
    ],
)
def test_answer_tokens(text: str, tokens: list[str]) -> None:
    assert metrics.answer_tokens(text) == tokens


def test_answers_are_compared_with_the_reference_that_fits_best() -> None:
    predictions = ["the Eiffel tower", "in Paris, France", "北京大学", "", "x"]
    references = [["Eiffel Tower."], ["Rome", "Paris"], ["北京"], [], []]
    assert metrics.exact_match(predictions, references) == 2 / 5
    # 1, {paris} of {in, paris, france}, 2 characters of 4, no answer, one where there is none
    expected = (1 + 2 * 1 / (3 + 1) + 2 * 2 / (4 + 2) + 1 + 0) / 5
    assert metrics.answer_f1(predictions, references) == pytest.approx(expected)


def test_a_repeated_token_counts_as_often_as_both_have_it() -> None:
    assert metrics.answer_f1(["no no no"], [["no no yes"]]) == pytest.approx(2 * 2 / 6)


def test_a_text_of_known_probability() -> None:
    # 6 tokens of probability 1/8 each are 18 bits, here of 9 bytes.
    nats = 6 * math.log(8)
    assert metrics.perplexity(nats, 6) == pytest.approx(8)
    assert metrics.bits_per_byte(nats, 9) == pytest.approx(2)
    assert metrics.perplexity(1e6, 1) == math.inf


def test_bleu_and_chrf_are_of_the_corpus() -> None:
    pytest.importorskip("sacrebleu")
    same = ["the cat sat on the mat today", "我喜欢编程和音乐"]
    assert metrics.bleu(same, [[text] for text in same]) == pytest.approx(100)
    assert metrics.chrf(same, [[text] for text in same]) == pytest.approx(100)
    # n-grams that match: 5 of 6, 4 of 5, 3 of 4, 2 of 3; the lengths are equal.
    prediction, reference = ["a b c d e f"], [["a b c d e g"]]
    expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4)
    assert metrics.bleu(prediction, reference) == pytest.approx(expected)
    # Without spaces, only the Chinese tokenizer sees that all characters but one match.
    prediction, reference = ["我喜欢编程和音乐"], [["我喜欢编程和舞乐"]]
    assert metrics.bleu(prediction, reference, tokenize="zh") > 40
    assert metrics.bleu(prediction, reference) < 1
    two = metrics.bleu(["a b c d e f"], [["x", "a b c d e f"]])
    assert two == pytest.approx(100)  # the second reference is read too


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one length and not empty.*\(2,\).*\(3,\)"):
        metrics.accuracy([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not empty"):
        metrics.f1([], [])
    with pytest.raises(TypeError, match="both be numbers or both be names"):
        metrics.accuracy([1], ["1"])
    with pytest.raises(ValueError, match=r"IOB2.*got 'S-P'"):
        metrics.spans(["S-P"])
    with pytest.raises(ValueError, match=r"predictions\[1\] has 1 tags and references\[1\] 2"):
        metrics.span_scores([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(TypeError, match="a list of texts for each prediction"):
        metrics.exact_match(["a"], ["a"])
    with pytest.raises(ValueError, match="got 1 and 2"):
        metrics.answer_f1(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        metrics.perplexity(0.0, 0)
