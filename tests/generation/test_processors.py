"""Each processor against transformers' of the same name; histories of unequal lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as theirs

from fastattn import GPT, GPTConfig
from fastattn.generation.processors import padded, process
from fastattn.generation.sampling import Sampling

V = 23
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 7, 5]]
NEW = [[3, 1, 2], [2, 4, 4], [6, 5, 6]]
TEXTS = [prompt + new for prompt, new in zip(PROMPTS, NEW, strict=True)]
ENDS = [3, 7]


def _process(
    logits: torch.Tensor,
    texts: list[list[int]],
    new: int,
    how: Sampling,
    ends: tuple[int, ...] = (),
    *,
    last: bool = False,
) -> torch.Tensor:
    size = (len(texts),)
    ids = padded(texts, V, logits.device)
    return process(logits, ids, torch.full(size, new), torch.full(size, last), how, ends)


def _logits(rows: int = 3) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(0))


def _cases() -> list[tuple[dict[str, Any], Any]]:
    ends = torch.tensor(ENDS)
    return [
        ({"repetition_penalty": 1.3}, lambda n: theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"no_repeat_ngram_size": 1}, lambda n: theirs.NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 3}, lambda n: theirs.NoRepeatNGramLogitsProcessor(3)),
        (
            {"bad_words_ids": [[8], [7], [2, 9], [4, 4, 4], [1, 2, 3], [1, 2, 5], [9] * 30]},
            lambda n: theirs.NoBadWordsLogitsProcessor(
                [[8], [7], [2, 9], [4, 4, 4], [1, 2, 3], [1, 2, 5], [9] * 30], ends
            ),
        ),
        ({"min_length": 8}, lambda n: theirs.MinLengthLogitsProcessor(8, ends)),
        ({"min_length": 4}, lambda n: theirs.MinLengthLogitsProcessor(4, ends)),
        (
            {"min_new_tokens": 4},
            lambda n: theirs.MinNewTokensLengthLogitsProcessor(n, 4, ends),
        ),
        (
            {"min_new_tokens": 3},
            lambda n: theirs.MinNewTokensLengthLogitsProcessor(n, 3, ends),
        ),
        ({"suppress_tokens": [2, 22]}, lambda n: theirs.SuppressTokensLogitsProcessor([2, 22])),
    ]


@pytest.mark.parametrize("case", range(len(_cases())), ids=lambda i: str(_cases()[i][0]))
def test_equal_to_transformers_row_by_row(case: int) -> None:
    settings, make = _cases()[case]
    logits = _logits()
    got = _process(logits, TEXTS, 3, Sampling(**settings), tuple(ENDS))
    for row, text in enumerate(TEXTS):
        processor = make(len(PROMPTS[row]))
        expected = processor(torch.tensor([text]), logits[row : row + 1].clone())
        torch.testing.assert_close(got[row : row + 1], expected)
    unchanged = (got == logits).all()
    assert unchanged == (settings in ({"min_length": 4}, {"min_new_tokens": 3}))


def test_presence_and_frequency_count_new_tokens() -> None:
    logits = _logits()
    how = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    got = _process(logits, TEXTS, 3, how)
    expected = logits.clone()
    for row, new in enumerate(NEW):
        for token in set(new):
            expected[row, token] -= 0.5 + 0.25 * new.count(token)
    torch.testing.assert_close(got, expected)
    assert torch.equal(_process(logits, TEXTS, 0, how), logits)


def test_forced_tokens() -> None:
    logits, text = _logits(2), [[1], [2]]
    first = Sampling(forced_bos_token_id=9, begin_suppress_tokens=[9, 4], forced_eos_token_id=[3])
    assert _process(logits, text, 0, first).argmax(-1).tolist() == [9, 9]
    # The beginning comes after the forced token.
    second = _process(logits, [[1, 9], [2, 9]], 1, first)
    assert second.isinf().nonzero().tolist() == [[0, 4], [0, 9], [1, 4], [1, 9]]
    third = _process(logits, [[1, 9, 0], [2, 9, 0]], 2, first)
    assert torch.equal(third, logits)
    last = _process(logits, text, 5, Sampling(forced_eos_token_id=3), last=True)
    assert last.argmax(-1).tolist() == [3, 3] and last.isinf().sum() == 2 * (V - 1)
    beginning = Sampling(begin_suppress_tokens=[4])
    assert _process(logits, text, 0, beginning).isinf().sum() == 2
    assert not _process(logits, text, 1, beginning).isinf().any()


def test_callers_processors_see_no_padding() -> None:
    seen: list[tuple[int, ...]] = []

    def add_last(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.extend(map(tuple, ids.tolist()))
        assert logits.dtype == torch.float32
        return logits + ids[:, -1:]

    logits = _logits().double()
    texts = [*TEXTS, TEXTS[0][::-1]]
    how = Sampling(logits_processor=[add_last, lambda ids, logits: 2 * logits])
    rows = torch.cat([logits, logits[:1]])
    got = _process(rows, texts, 3, how)
    assert sorted(seen) == sorted(map(tuple, texts))
    last = torch.tensor([[text[-1]] for text in texts])
    torch.testing.assert_close(got, 2 * (rows.float() + last))


@pytest.mark.parametrize("wrong", [lambda ids, x: x[:, 1:], lambda ids, x: None], ids=["a", "b"])
def test_callers_processor_of_another_shape(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"logits_processor must return logits of the shape \(1, "):
        _model().generate([[1, 2], [3]], max_new_tokens=2, logits_processor=wrong)


def _model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(V, 32, 16, 1, 2, initializer_range=0.3, eos_token_id=None, bos_token_id=None)
    return GPT(config).eval()


def test_transformers_processors_in_generate() -> None:
    """Theirs are called as ours are; a batch gives each prompt's own tokens."""
    model = _model()
    ours = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "suppress_tokens": [5]}
    same = [
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
        theirs.NoRepeatNGramLogitsProcessor(2),
        theirs.SuppressTokensLogitsProcessor([5]),
    ]
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 3}):
        expected = model.generate(PROMPTS, max_new_tokens=12, **ours, **how)
        got = model.generate(PROMPTS, max_new_tokens=12, logits_processor=same, **how)
        assert torch.equal(got, expected)
