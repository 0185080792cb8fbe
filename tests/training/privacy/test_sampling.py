"""Poisson sampling: coins of their own for each example and step; rows that hold one example."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from training.privacy import private as p

from fastattn.training import Causal, Tokenizer
from fastattn.training.data import prepare
from fastattn.training.objectives import Chat, Masked
from fastattn.training.privacy.budget import PrivacyConfig
from fastattn.training.privacy.sampling import Key, Sampled


def joined(sampled: Sampled, steps: int) -> numpy.ndarray:
    """(steps, examples): which example was in which batch, by its first tokens."""
    texts = [tuple(sampled._piece(i)["input_ids"].tolist()) for i in range(len(sampled.examples))]
    places = {text: i for i, text in enumerate(texts)}
    assert len(places) == len(texts)
    found = numpy.zeros((steps, len(texts)), dtype=bool)
    for step in range(steps):
        arguments = sampled.batch(step).arguments
        targets = arguments.get("targets", torch.zeros(0, 0))
        for row, counting in zip(arguments.get("input_ids", ()), targets):
            length = int((counting != -100).sum()) + 1
            place = places[tuple(row[:length].tolist())]
            assert not found[step, place]
            found[step, place] = True
    return found


def test_each_example_joins_by_a_coin_of_its_own(tmp_path: Path) -> None:
    """The share of each example, of each pair, and how much the sizes vary: five deviations."""
    sampled = Sampled(p.examples(tmp_path), Causal(p.TOKENIZER), 6, 24, Key(3))
    steps, rate = 500, 6 / 30
    found = joined(sampled, steps)
    assert sampled.rate == rate and sampled.per_epoch == 5
    deviation = (rate * (1 - rate) / steps) ** 0.5
    assert (abs(found.mean(0) - rate) < 5 * deviation).all()
    pairs = (found.T.astype(float) @ found) / steps
    off = pairs[~numpy.eye(30, dtype=bool)]
    assert (abs(off - rate**2) < 5 * (rate**2 * (1 - rate**2) / steps) ** 0.5).all()
    sizes = found.sum(1)
    variance = 30 * rate * (1 - rate)
    assert abs(sizes.var() - variance) < 5 * variance * (2 / steps) ** 0.5
    assert (joined(sampled, 5) == found[:5]).all()
    other = Sampled(p.examples(tmp_path), Causal(p.TOKENIZER), 6, 24, Key(4))
    assert (joined(other, 5) != found[:5]).any()


def test_all_examples_join_where_a_batch_is_all_of_them(tmp_path: Path) -> None:
    sampled = Sampled(p.examples(tmp_path), Causal(p.TOKENIZER), 30, 24, Key(2**127 + 1))
    assert joined(sampled, 3).all()
    assert sampled.cut == sum(len(text) + 1 > 24 for text in p.TEXTS) > 0


def test_a_step_may_have_nobody_and_a_text_no_target(tmp_path: Path) -> None:
    texts = ["", "a", "", ""]  # an empty one is only an end of text, which nothing predicts
    sampled = Sampled(p.examples(tmp_path, texts=texts), Causal(p.TOKENIZER), 1, 24, Key(0))
    sizes = {len(sampled.batch(step).arguments.get("input_ids", ())) for step in range(40)}
    assert sizes == {0, 1}


def test_a_conversation_has_the_row_that_it_has_alone(tmp_path: Path) -> None:
    """Targets are the answer's; a conversation that the context cuts before its answer has none."""
    turns = [("hi", "hello there"), ("a question that fills all of the context " * 3, "yes")]
    records = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    chat = Chat(Tokenizer.train(["a"], 300, extra_tokens=Chat.extra_tokens))
    examples = prepare(file, chat, tmp_path / "prepared")
    batch = Sampled(examples, chat, 2, 60, Key(0)).batch(0)
    alone = chat.collate([examples[0]], numpy.random.default_rng(0)).arguments
    assert torch.equal(batch.arguments["input_ids"], alone["input_ids"])
    assert torch.equal(batch.arguments["targets"], alone["targets"])
    assert batch.counted == len("hello there") + 1


def test_refusals(tmp_path: Path) -> None:
    examples = p.examples(tmp_path)
    masking = Tokenizer.train(["a"], 270, special_tokens={r: f"<|{r}|>" for r in Masked.roles})
    with pytest.raises(ValueError, match="got the library 'fastattn' with 'masked'"):
        Sampled(examples, Masked(masking), 2, 24, Key(0))
    with pytest.raises(ValueError, match="'transformers' with 'causal'"):
        Sampled(examples, Causal(p.TOKENIZER, interface="transformers"), 2, 24, Key(0))
    with pytest.raises(ValueError, match=r"fewer than batch_size \(31\)"):
        Sampled(examples, Causal(p.TOKENIZER), 31, 24, Key(0))

    class Halves(Causal):
        def encode(self, record):  # type: ignore[no-untyped-def]
            (whole,) = super().encode(record)
            ids = whole["input_ids"]
            return [{"input_ids": ids[:5]}, {"input_ids": ids[5:]}]

    file = tmp_path / "more.txt"
    file.write_text("one text of more than five tokens", encoding="utf-8")
    halves = prepare(file, Halves(p.TOKENIZER), tmp_path / "halves")
    with pytest.raises(ValueError, match="several examples are of one record"):
        Sampled(halves, Halves(p.TOKENIZER), 1, 24, Key(0))


def test_epsilon_is_that_of_opacus_step_by_step() -> None:
    accountants = pytest.importorskip("opacus.accountants")
    for name in ("rdp", "prv"):
        theirs = accountants.create_accountant(mechanism=name)
        settings = PrivacyConfig(noise_multiplier=1.1, accountant=name, delta=1e-4)
        for _ in range(40):
            theirs.step(noise_multiplier=1.1, sample_rate=0.03)
        assert settings.spent(1.1, 0.03, 40) == theirs.get_epsilon(delta=1e-4)
        assert settings.spent(1.1, 0.03, 0) == 0.0


@pytest.mark.parametrize("name", ["rdp", "prv"])
def test_noise_keeps_within_the_budget(name: str) -> None:
    pytest.importorskip("opacus")
    settings = PrivacyConfig(epsilon=3.0, accountant=name)  # type: ignore[arg-type]
    noise = settings.noise(0.05, 200)
    assert 2.98 <= settings.spent(noise, 0.05, 200) <= 3.0
    assert settings.spent(noise / 1.05, 0.05, 200) > 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be positive"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "exclude each other"),
        ({"epsilon": 60.0, "accountant": "prv"}, "too large"),
        ({"delta": 1.0}, "delta"),
        ({"accountant": "gdp"}, "accountant must be"),
        ({"examples_at_once": 0}, "examples_at_once"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_settings_out_of_range(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivacyConfig(**changes)  # type: ignore[arg-type]


def test_a_budget_that_no_noise_keeps() -> None:
    pytest.importorskip("opacus")
    with pytest.raises(ValueError, match="no noise gives epsilon"):
        PrivacyConfig(epsilon=1e-7, delta=1e-9).noise(1.0, 1000)
