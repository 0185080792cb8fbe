"""Beam search: transformers' tokens, and those of each prompt alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation.small import Letters, make_prompts, padded

from fastattn import GPT
from fastattn.generation import decoding

Pair = tuple[GPT, Any]
MakePair = Callable[..., Pair]
LENGTHS = [5, 12, 1]
PROMPTS = make_prompts(LENGTHS, 97)
# Not 0, in place of which transformers' beams pad with the first end token.
PAD = 96


def _theirs(model: Any, prompts: list[list[int]], pad: int = PAD, **settings: Any) -> torch.Tensor:
    ids, mask = padded(prompts, pad, model.device)
    settings = {"do_sample": False, "pad_token_id": pad, **settings}
    return model.generate(ids, attention_mask=mask, **settings)


def _ends(model: GPT, prompts: list[list[int]], count: int) -> list[int]:
    """Tokens that come up early in some continuations, and late in others."""
    free = model.generate(prompts, max_new_tokens=12, num_beams=3, num_return_sequences=3)
    new = free[:, max(map(len, prompts)) :]
    return sorted({int(new[(3 * i) % len(new), 2 + 4 * i]) for i in range(count)})


SETTINGS = [
    {"num_beams": beams, "early_stopping": early, "length_penalty": penalty}
    for beams, (early, penalty) in zip(
        itertools.cycle([2, 4, 3]),
        itertools.product([False, True, "never"], [1.0, 0.0, 2.0, -0.5]),
        strict=False,
    )
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equal_to_transformers(make_pair: MakePair, settings: dict[str, Any]) -> None:
    """Ends come at various times; unequal prompts in one batch."""
    seed = SETTINGS.index(settings)
    ours, theirs = make_pair(seed=seed)
    prompts = make_prompts(LENGTHS, 97, seed)
    for ends in (None, _ends(ours, prompts, 1 + seed % 3)):
        every = {"max_new_tokens": 12, "eos_token_id": ends, **settings}
        every |= {"num_return_sequences": settings["num_beams"]}
        got = ours.generate(prompts, pad_token_id=PAD, **every)
        assert torch.equal(got, _theirs(theirs, prompts, **every))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(12, 15))
def test_equal_to_transformers_for_many_seeds(make_pair: MakePair, seed: int) -> None:
    ours, theirs = make_pair(seed=seed)
    prompts = make_prompts(LENGTHS, 97, seed)
    for settings, count in itertools.product(SETTINGS, (1, 2)):
        every = {"max_new_tokens": 20, "eos_token_id": _ends(ours, prompts, count), **settings}
        got = ours.generate(prompts, pad_token_id=PAD, **every)
        assert torch.equal(got, _theirs(theirs, prompts, **every)), settings


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "length_penalty": 2.0, "early_stopping": True},
        {"min_new_tokens": 8, "bad_words_ids": [[3], [85, 12]], "suppress_tokens": [7, 58]},
        {"forced_eos_token_id": 11, "begin_suppress_tokens": [1, 96]},
    ],
    ids=str,
)
def test_processors_equal_transformers(pair: Pair, settings: dict[str, Any]) -> None:
    ours, theirs = pair
    prompts = PROMPTS[:1] if "repetition_penalty" not in settings else PROMPTS
    every = {"max_new_tokens": 12, "num_beams": 3, "eos_token_id": _ends(ours, prompts, 1)}
    got = ours.generate(prompts, pad_token_id=PAD, **every, **settings)
    assert torch.equal(got, _theirs(theirs, prompts, **every, **settings))
    assert not torch.equal(got, ours.generate(prompts, pad_token_id=PAD, **every))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 10, "temperature": 0.7}, {"top_p": 0.6, "min_p": 0.05}, {"top_k": 1}],
    ids=str,
)
def test_sampling_draws_as_transformers_does(pair: Pair, settings: dict[str, Any]) -> None:
    """From torch's generator, in the same order."""
    ours, theirs = pair
    prompts = [p[:1] + [5] * 4 for p in PROMPTS]
    every = {"max_new_tokens": 10, "num_beams": 3, "do_sample": True, "num_return_sequences": 2}
    every |= {"eos_token_id": _ends(ours, prompts, 2)}
    torch.manual_seed(3)
    got = ours.generate(prompts, pad_token_id=PAD, **every, **settings)
    torch.manual_seed(3)
    expected = _theirs(theirs, prompts, **{"top_k": 0, **every, **settings})
    assert torch.equal(got, expected)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_batch_equals_each_prompt_alone(pair: Pair, sampled: bool) -> None:
    ours, _ = pair
    prompts = PROMPTS
    every = {"max_new_tokens": 14, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": PAD}
    every |= {"eos_token_id": _ends(ours, prompts, 2), "repetition_penalty": 1.1}
    if sampled:
        every |= {"do_sample": True, "temperature": 1.5}
    together = ours.generate(prompts, **every, seed=[7, 8, 9] if sampled else None)
    for row, prompt in enumerate(prompts):
        alone = ours.generate([prompt], **every, seed=[7 + row] if sampled else None)
        rows = together[2 * row : 2 * row + 2, max(LENGTHS) - len(prompt) :]
        assert torch.equal(rows[:, : alone.shape[1]], alone)
        assert (rows[:, alone.shape[1] :] == PAD).all()


def test_steps_in_vain_leave_no_trace(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which is asked only now and then whether all prompts are settled."""
    ours, _ = pair
    prompts = PROMPTS
    every = {"max_new_tokens": 20, "num_beams": 3, "eos_token_id": _ends(ours, prompts, 3)}
    expected = ours.generate(prompts, early_stopping=True, **every)
    steps = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args: (steps.append(1), decode(*args))[1])
    got = ours.generate(prompts, early_stopping=True, **every)
    needed = len(steps)
    assert torch.equal(got, expected) and needed < 19
    monkeypatch.setattr(decoding, "check_every", lambda *args: 16)
    assert torch.equal(ours.generate(prompts, early_stopping=True, **every), expected)
    assert len(steps) - needed > needed


def test_stop_strings(pair: Pair) -> None:
    """The best sequences that end with the text, scored as if by an end token."""

    ours, _ = pair
    prompts = PROMPTS
    every = {"max_new_tokens": 12, "num_beams": 3, "pad_token_id": PAD}
    (end,) = _ends(ours, prompts, 1)
    got = ours.generate(
        prompts, stop_strings=chr(0x4E00 + end), tokenizer=Letters(), eos_token_id=(), **every
    )
    # Without an end token there are 2 candidates a beam, with one of them as well.
    assert torch.equal(got, ours.generate(prompts, eos_token_id=end, **every))
