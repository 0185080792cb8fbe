"""A stream of tokens and its windows."""

from __future__ import annotations

import numpy
import pytest
import torch

from fastattn.training import Tokenizer, Windows, tokenize
from fastattn.training.contract import Batch


def _pair(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    assert batch.counted == batch.tokens == batch.arguments["targets"].numel()
    return batch.arguments["input_ids"], batch.arguments["targets"]


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
    inputs, targets = _pair(Windows(torch.arange(1000, 1050), 64, 7).batch(0))
    assert inputs.shape == targets.shape == (64, 7)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
    assert inputs.min() == 1000 and targets.max() == 1049  # both ends are reached


def test_a_batch_follows_from_the_seed_and_its_number() -> None:
    """Whatever was drawn before, here or elsewhere, and wherever tensors are by default."""
    tokens = torch.arange(500)

    def draw(seed: int, *numbers: int) -> list[torch.Tensor]:
        windows = Windows(tokens, 4, 16, seed)
        return [windows.batch(number).arguments["input_ids"] for number in numbers]

    first = draw(0, 0, 1, 2)
    torch.manual_seed(1)
    numpy.random.seed(1)
    torch.set_default_device("meta")
    try:
        assert all(torch.equal(x, y) for x, y in zip(reversed(first), draw(0, 2, 1, 0)))
    finally:
        torch.set_default_device(None)
    assert not torch.equal(first[0], first[1])
    for seed in (1, -1, 2**64 - 2):
        assert not torch.equal(first[0], draw(seed, 0)[0])


def test_once_has_each_target_once() -> None:
    tokens = torch.arange(100)
    batches = [_pair(batch) for batch in Windows(tokens, batch_size=3, context=9).once()]
    targets = torch.cat([targets.flatten() for _, targets in batches])
    assert torch.equal(targets, torch.arange(1, 100))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 3, 2]


def test_one_window_is_enough() -> None:
    tokens = torch.arange(17)
    inputs, targets = _pair(Windows(tokens, 2, 16).batch(3))
    assert torch.equal(inputs[1], tokens[:-1]) and torch.equal(targets[1], tokens[1:])


def test_what_is_no_stream_is_refused() -> None:
    for tokens in (torch.zeros(4, 40, dtype=torch.int64), torch.zeros(40)):
        with pytest.raises(ValueError, match="tokens must be a stream of tokens"):
            Windows(tokens, 1, 16)
    for length in (0, 1, 16):
        message = f"tokens has {length} tokens; a context of 16 needs at least 17"
        with pytest.raises(ValueError, match=message):
            Windows(torch.zeros(length, dtype=torch.int64), 1, 16)
    for sizes in ({"batch_size": 0, "context": 4}, {"batch_size": 4, "context": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            Windows(torch.arange(40), **sizes)
