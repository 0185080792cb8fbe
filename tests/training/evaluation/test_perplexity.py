"""The sliding window against its definition: each token from the tokens before it, one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastattn
from fastattn.training import Tokenizer
from fastattn.training.evaluation.perplexity import bits_per_byte, perplexity, windows

TEXT = "hello 天气, hello hello; the weather 今天天气很好 is good"
CONTEXT = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["hello hello the weather"], 257 + 8)


@pytest.fixture(scope="module", params=["ours", "transformers"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Any:
    torch.manual_seed(0)
    if request.param == "ours":
        return fastattn.GPT(
            fastattn.GPTConfig(
                vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                bos_token_id=0, eos_token_id=0, initializer_range=0.3, embd_pdrop=0.1,
            )
        )  # fmt: skip
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=16, n_layer=2, n_head=2,
            initializer_range=0.3,
        )
    )  # fmt: skip


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Of the token after `ids`, in float64, without dropout."""
    training = model.training
    with torch.no_grad():
        out = model.double().eval()(torch.tensor([ids]))
    model.float().train(training)
    return getattr(out, "logits", out)[0, -1].log_softmax(-1)


def slowly(model: Any, ids: list[int], context: int, stride: int) -> float:
    """Nats by the definition: target i is in the first window that reaches it."""
    nats = 0.0
    for i in range(1, len(ids)):
        end = context if i <= context else context + -(-(i - context) // stride) * stride
        first = max(0, min(end, len(ids) - 1) - context)
        nats -= logits(model, ids[first:i])[ids[i]].item()
    return nats


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_is_that_of_the_definition_at_any_batch_size(
    model: Any, tokenizer: Tokenizer, stride: int
) -> None:
    ids = [tokenizer.end_of_text, *tokenizer.encode(TEXT)]
    expected = slowly(model, ids, CONTEXT, stride)
    for batch_size in (1, 3, 8):
        found = perplexity(
            model, tokenizer, TEXT, context=CONTEXT, stride=stride, batch_size=batch_size
        )
        assert found.nats == pytest.approx(expected, rel=1e-6)
        assert found.tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(expected / (len(ids) - 1)), rel=1e-5)
    bits = expected / math.log(2) / len(TEXT.encode())
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert model.training  # dropout is on again
    if stride == CONTEXT:
        assert bits_per_byte(model, tokenizer, TEXT, CONTEXT) == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 40])
@pytest.mark.parametrize("stride", range(1, 9))
def test_windows_ask_for_every_token_once_with_enough_before_it(length: int, stride: int) -> None:
    ids = list(range(length))
    rows = list(windows(ids, CONTEXT, stride))
    assert [i for row in rows for i in row.tokens] == ids[1:]
    for row in rows:
        assert row.context[-1] == row.tokens[0] - 1
        assert len(row.context) + len(row.tokens) - 1 <= CONTEXT
        assert row.context[0] == 0 or len(row.context) >= CONTEXT - stride + 1


def test_several_texts_are_read_one_by_one(model: Any, tokenizer: Tokenizer) -> None:
    both = perplexity(model, tokenizer, [TEXT, "hello"])
    alone = [perplexity(model, tokenizer, text) for text in (TEXT, "hello")]
    assert both.nats == pytest.approx(sum(found.nats for found in alone), rel=1e-6)
    assert both.tokens == sum(found.tokens for found in alone)
    assert both.bytes == sum(found.bytes for found in alone)


def test_all_positions_are_the_default(model: Any, tokenizer: Tokenizer) -> None:
    whole = perplexity(model, tokenizer, TEXT, context=16, stride=8)
    assert perplexity(model, tokenizer, TEXT) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ""}, "texts must be at least one, and none empty"),
        ({"texts": []}, "texts must be at least one, and none empty"),
        ({"context": 17}, "context must be at most the model's 16 positions, got 17"),
        ({"context": 0}, "context must be at least 1"),
        ({"context": 4, "stride": 5}, "stride must be at most the context, 4, got 5"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_arguments_out_of_range(
    model: Any, tokenizer: Tokenizer, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, **{"texts": TEXT, **arguments})
