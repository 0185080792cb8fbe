"""Spans that are cut out: the counts of the paper's formula, and nothing lost between two texts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers

from fastattn.models import EncoderDecoder
from fastattn.training import Tokenizer
from fastattn.training.contract import Interface
from fastattn.training.objectives import SpanCorruption
from fastattn.training.objectives.span_corruption import SpanCorruptionSettings, _parts

SENTINELS = SpanCorruption.extra_tokens


def _tokenizer(extra: tuple[str, ...] = SENTINELS) -> Tokenizer:
    roles = {"pad": "<pad>", "eos": "</s>"}
    return Tokenizer.train(["abc def"], 400, special_tokens=roles, extra_tokens=extra)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return _tokenizer()


def _ids(tokenizer: Tokenizer, length: int, random: numpy.random.Generator) -> numpy.ndarray:
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    return random.choice(ordinary, length).astype(numpy.uint16)


@pytest.mark.parametrize(
    "settings",
    [{}, {"noise_density": 0.5, "mean_span_length": 1.0}, {"noise_density": 0.9}],
    ids=str,
)
def test_nothing_is_lost(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Each sentinel of the inputs, replaced by what follows it in the targets, gives the text."""
    objective = SpanCorruption(tokenizer, SpanCorruptionSettings(context=200, **settings))
    density = objective.settings.noise_density
    mean = objective.settings.mean_span_length
    random = numpy.random.default_rng(0)
    sentinels = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(len(SENTINELS))]
    lengths = [2, 3, 4, 7, 19, 20, 100, 181]
    examples = [{"input_ids": _ids(tokenizer, n, random)} for n in lengths]
    batch = objective.collate(examples, random)
    sizes = [0, 0]
    for row, example in enumerate(examples):
        text = example["input_ids"].tolist()
        inputs = batch.arguments["input_ids"][row].tolist()
        if "attention_mask" in batch.arguments:
            inputs = inputs[: int(batch.arguments["attention_mask"][row].sum())]
        targets = [i for i in batch.arguments["targets"][row].tolist() if i != -100]
        # T5's random_spans_noise_mask (arXiv:1910.10683).
        noise = min(max(int(numpy.round(len(text) * density)), 1), len(text) - 1)
        spans = min(max(int(numpy.round(noise / mean)), 1), len(text) - noise)
        assert len(inputs) == len(text) - noise + spans + 1
        assert len(targets) == noise + spans + 1
        assert [i for i in inputs if i in sentinels] == sentinels[:spans]
        assert inputs[-1] == targets[-1] == tokenizer.token("eos")
        cut: dict[int, list[int]] = {}
        for i in targets[:-1]:
            if i in sentinels:
                last = cut.setdefault(i, [])
            else:
                last.append(i)
        assert all(cut.values()) and [*cut] == sentinels[:spans]
        assert [*itertools.chain(*(cut.get(i, [i]) for i in inputs[:-1]))] == text
        sizes[0] += len(inputs)
        sizes[1] += len(targets)
    assert batch.counted == sizes[1] and batch.tokens == sum(sizes)


def test_sentinels_descend_as_t5s(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(100)]
    assert ids == [ids[0] - i for i in range(100)]  # type: ignore[operator]


def test_parts_are_uniform() -> None:
    random = numpy.random.default_rng(0)
    draws = [tuple(_parts(5, 3, random)) for _ in range(6000)]
    assert {sum(parts) for parts in draws} == {5}
    compositions = {(a, b, 5 - a - b) for a in range(1, 4) for b in range(1, 5 - a)}
    counts = {parts: draws.count(parts) for parts in compositions}
    assert sum(counts.values()) == len(draws)  # nothing else was drawn
    assert all(abs(count - 1000) < 4.5 * 29 for count in counts.values())  # sqrt(6000 5/36) = 29
    assert _parts(1, 1, random) == [1]
    assert _parts(4, 4, random) == [1, 1, 1, 1]


@pytest.mark.parametrize("context", [3, 4, 17, 64])
def test_blocks_fill_the_context(tokenizer: Tokenizer, context: int) -> None:
    objective = SpanCorruption(tokenizer, SpanCorruptionSettings(context=context))
    text = "abcdef " * 40 + "a"
    blocks = [example["input_ids"].tolist() for example in objective.encode({"text": text})]
    ids = tokenizer.encode(text)
    joined = [*itertools.chain(*blocks)]
    assert joined == ids[: len(joined)] and len(ids) - len(joined) <= 1  # one has nothing to cut
    longest = len(blocks[0])
    assert {len(block) for block in blocks[:-1]} == {longest}
    assert objective.settings.corrupted_length(longest) <= context
    assert objective.settings.corrupted_length(longest + 1) > context
    assert not list(objective.encode({"text": ""}))


def test_drawn_again_by_the_generator(tokenizer: Tokenizer) -> None:
    objective = SpanCorruption(tokenizer, SpanCorruptionSettings(context=64))
    examples = list(objective.encode({"text": "abcdef " * 9}))
    first, same, other = (
        objective.collate(examples, numpy.random.default_rng(seed)).arguments["targets"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small T5 of transformers."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": tokenizer.token("pad"), "eos_token_id": tokenizer.token("eos")}
    config = transformers.T5Config(
        vocab_size=tokenizer.vocab_size, dropout_rate=0.0, **sizes, **tokens,
        decoder_start_token_id=tokenizer.token("pad"),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("t5")
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("interface", ["fastattn", "transformers"])
def test_the_loss_of_both_libraries(
    tokenizer: Tokenizer, folder: Path, interface: Interface
) -> None:
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    random = numpy.random.default_rng(0)
    examples = [{"input_ids": _ids(tokenizer, n, random)} for n in (30, 9, 17)]
    model: Any = theirs if interface == "transformers" else EncoderDecoder.from_pretrained(folder)
    objective = SpanCorruption(tokenizer, interface=interface)
    batch = objective.collate(examples, random)
    targets = batch.arguments["labels" if interface == "transformers" else "targets"]
    shifted = F.pad(targets[:, :-1], (1, 0), value=tokenizer.token("pad"))
    logits = theirs(
        input_ids=batch.arguments["input_ids"],
        attention_mask=batch.arguments["attention_mask"],
        decoder_input_ids=shifted.masked_fill(shifted == -100, tokenizer.token("pad")),
    ).logits
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    assert objective.loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_too_few_sentinels() -> None:
    tokenizer = _tokenizer(SENTINELS[-3:])
    SpanCorruption(tokenizer, SpanCorruptionSettings(context=60))
    message = r"context of 512 tokens needs the sentinels .* <extra_id_27>, .* has 3 of them"
    with pytest.raises(ValueError, match=message):
        SpanCorruption(tokenizer)
