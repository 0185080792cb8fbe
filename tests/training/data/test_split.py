"""The split into training and validation, and the batches."""

from __future__ import annotations

import random

import pytest
import torch

from fastattn.training import Tokenizer, sample_batch, split_text, tokenize
from fastattn.training.data import consecutive_batches


@pytest.mark.parametrize("seed", range(20))
def test_split_is_contiguous_at_a_line_and_close_to_the_fraction(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join("x" * draw.randrange(40) + "\n" for _ in range(100))
    fraction = draw.uniform(0.05, 0.95)
    training, validation = split_text(text, fraction)
    assert training + validation == text
    assert training.endswith("\n")
    assert 0 <= len(validation) - fraction * len(text) <= 41  # at most one line more


@pytest.mark.parametrize("text", ["", "\n\n\n", "one line without an end", "one line\n"])
def test_too_little_text_to_split_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"too few to keep 0\.1 of it for validation"):
        split_text(text)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction must be in"):
        split_text("a\nb\n", fraction)


def test_streams_hold_every_text_and_its_end() -> None:
    tokenizer = Tokenizer.train(["some text to learn from"], vocab_size=300)
    split = tokenize(tokenizer, {"a": ("first\n", "held\n"), "b": ("second\n", "out\n")})
    end = "<|endoftext|>"
    assert tokenizer.decode(split.training.tolist()) == f"first\n{end}second\n{end}"
    assert tokenizer.decode(split.validation.tolist()) == f"held\n{end}out\n{end}"
    assert split.training.dtype == torch.int64
    with pytest.raises(ValueError, match="parts is empty"):
        tokenize(tokenizer, {})


def test_batches_are_windows_with_the_next_tokens_as_targets() -> None:
    tokens = torch.arange(1000, 1050)
    inputs, targets = sample_batch(tokens, 64, 7, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (64, 7)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
    assert inputs.min() == 1000 and targets.max() == 1049  # both ends are reached


def test_batches_follow_the_seed_alone() -> None:
    tokens = torch.arange(500)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([sample_batch(tokens, 4, 16, generator)[0] for _ in range(3)])

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    assert not torch.equal(first[0], first[1])


def test_the_default_device_does_not_count() -> None:
    tokens = torch.arange(1000)
    expected = sample_batch(tokens, 4, 16, torch.Generator().manual_seed(0))
    torch.set_default_device("meta")
    try:
        got = sample_batch(tokens, 4, 16, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


def test_consecutive_batches_have_each_target_once() -> None:
    tokens = torch.arange(100)
    batches = list(consecutive_batches(tokens, batch_size=3, context=9))
    targets = torch.cat([targets.flatten() for _, targets in batches])
    assert torch.equal(targets, torch.arange(1, 100))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 3, 2]


@pytest.mark.parametrize("length", [0, 1, 16])
def test_a_stream_shorter_than_the_context_is_refused(length: int) -> None:
    tokens = torch.zeros(length, dtype=torch.int64)
    message = f"tokens has {length} tokens; a context of 16 needs at least 17"
    with pytest.raises(ValueError, match=message):
        sample_batch(tokens, 1, 16, torch.Generator())
    with pytest.raises(ValueError, match=message):
        next(consecutive_batches(tokens, 1, 16))


def test_one_window_is_enough() -> None:
    tokens = torch.arange(17)
    inputs, targets = sample_batch(tokens, 2, 16, torch.Generator())
    assert torch.equal(inputs[1], tokens[:-1]) and torch.equal(targets[1], tokens[1:])


def test_what_is_no_stream_is_refused() -> None:
    for tokens in (torch.zeros(4, 40, dtype=torch.int64), torch.zeros(40)):
        with pytest.raises(ValueError, match="tokens must be a stream of tokens"):
            sample_batch(tokens, 1, 16, torch.Generator())
