"""Dialogue as an objective: which tokens count, in which rows, with which loss."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import fastattn
from fastattn.ops.cross_entropy import IGNORED
from fastattn.training import Tokenizer
from fastattn.training.dialogue import TEMPLATE, TURN_TOKENS, render
from fastattn.training.objectives import Chat

RANDOM = numpy.random.default_rng(0)


@pytest.fixture()
def tokenizer() -> Tokenizer:
    texts = ["the quick brown fox, 我喜欢编程。\n" * 20]
    return Tokenizer.train(texts, 330, extra_tokens=TURN_TOKENS)


def _record(*contents: str) -> dict[str, list[dict[str, str]]]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": text} for r, text in zip(roles, contents)]}


def test_a_tokenizer_without_a_template_gets_ours(tokenizer: Tokenizer) -> None:
    objective = Chat(tokenizer)
    assert tokenizer.chat_template == TEMPLATE
    assert objective.end_of_turn == tokenizer.token_to_id(TURN_TOKENS[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert Chat(tokenizer).end_of_turn == tokenizer.token("eos")
    with pytest.raises(ValueError, match=r"special tokens <\|im_start\|> and <\|im_end\|>"):
        Chat(Tokenizer.train(["text"], 300))


def test_an_example_is_a_conversation(tokenizer: Tokenizer) -> None:
    objective = Chat(tokenizer)
    record = _record("quick?", "fox", "我", "编程")
    (example,) = objective.encode(record)
    assert example.keys() == set(objective.fields)
    ids = example["input_ids"]
    assert tokenizer.decode(ids.tolist()) == render(tokenizer, record["messages"])
    answers = ids[example["answer"] == 1].tolist()
    assert tokenizer.decode(answers) == "fox<|im_end|>编程<|im_end|>"
    with pytest.raises(ValueError, match="'messages' of a record has no message of the assistant"):
        list(objective.encode(_record("quick?")))
    with pytest.raises(ValueError, match="no field 'messages'; fields: text"):
        list(objective.encode({"text": "a"}))


def test_the_loss_is_of_the_answers_only(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    objective = Chat(tokenizer)
    config = fastattn.GPTConfig(
        vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=objective.end_of_turn, initializer_range=0.3,
    )  # fmt: skip
    model = fastattn.GPT(config).eval()
    records = [_record("quick?", "fox", "我", "编程"), _record("the", " brown fox\n")]
    examples = [example for record in records for example in objective.encode(record)]
    losses = []
    for example in examples:  # the plain definition, a conversation at a time
        ids = torch.from_numpy(example["input_ids"])
        with torch.no_grad():
            table = model(ids[None])[0].double().log_softmax(-1)
        for place in numpy.flatnonzero(example["answer"]):
            losses.append(-table[place - 1, ids[place]].item())
    batch = objective.collate(examples, RANDOM)
    assert (batch.counted, batch.tokens) == (len(losses), sum(len(e["answer"]) for e in examples))
    with torch.no_grad():
        measured = objective.measure(model, [batch])
    mean = numpy.mean(losses)
    assert measured == pytest.approx({"loss": mean, "perplexity": math.exp(mean)}, rel=1e-5)
    objective.loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_piece_of_a_conversation_has_the_targets_that_are_in_it(tokenizer: Tokenizer) -> None:
    objective = Chat(tokenizer, interface="transformers")
    (example,) = objective.encode(_record("quick?", "fox", "我", "编程"))
    place = int(numpy.flatnonzero(example["answer"])[1])  # in the middle of an answer
    pieces = [
        {name: values[part] for name, values in example.items()}
        for part in (slice(0, place), slice(place, None))
    ]
    batch = objective.collate(pieces, RANDOM)
    labels = numpy.where(example["answer"] == 1, example["input_ids"], IGNORED)
    labels[place] = IGNORED  # nothing is before it in its piece
    assert batch.arguments["labels"][0].tolist() == labels.tolist()
    assert batch.counted == int((labels != IGNORED).sum())
