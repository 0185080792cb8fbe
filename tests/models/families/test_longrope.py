"""Rotary frequencies that depend on the length: below and above it, packed, and with a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models.families.cases import LONGROPE, theirs

import fastattn
from fastattn import GPT
from fastattn.generation import Engine, scoring
from fastattn.models import EncoderConfig
from fastattn.nn import PackedSequences

SHORT = LONGROPE["original_max_position_embeddings"]  # 24
NAMES = ["phi3, longrope", "llama, longrope"]


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture
def ours(tmp_path: Path) -> GPT:
    theirs(NAMES[0]).save_pretrained(tmp_path)
    model = fastattn.models.load(tmp_path)
    assert isinstance(model, GPT)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_on_both_sides(name: str, tmp_path: Path) -> None:
    original = theirs(name)
    original.save_pretrained(tmp_path)
    model = fastattn.models.load(tmp_path)
    assert model.config.short_positions == SHORT
    lengths = [5, SHORT + 1, SHORT, 64]
    for length in lengths:
        tokens = _tokens(length)
        expected = original(tokens).logits
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
        cached = model(tokens, cache=model.new_cache(1, length))
        torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0)
    row = torch.cat([_tokens(length) for length in lengths], 1)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    packed = model(row, packed=PackedSequences(starts, max(lengths)))
    apart = torch.cat([model(_tokens(length)) for length in lengths], 1)
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(7, 3, SHORT - 9), (SHORT + 1, 40, 31)], ids=["short", "long"])
def test_greedy_tokens_and_beams(name: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    original = theirs(name, eos_token_id=None)
    original.save_pretrained(tmp_path)
    model = fastattn.models.load(tmp_path)
    prompts = [_tokens(length)[0].tolist() for length in lengths]
    got = model.generate(prompts, max_new_tokens=9)
    for row, prompt in enumerate(prompts):
        one, rest = torch.tensor([prompt]), {"max_new_tokens": 9, "do_sample": False}
        assert torch.equal(got[row, -9:], original.generate(one, **rest)[0, len(prompt) :])
        beams = original.generate(one, num_beams=3, **rest)
        assert torch.equal(model.generate(one, num_beams=3, max_new_tokens=9), beams)


@torch.no_grad()
def test_a_cached_sequence_stays_on_its_side(ours: GPT) -> None:
    cache = ours.new_cache(2, 60)
    ours(_tokens(20).expand(2, -1), cache=cache)
    with pytest.raises(ValueError, match="5 tokens after 20 in the cache, and beyond 24"):
        ours(_tokens(5).expand(2, -1), cache=cache)
    ours(_tokens(4).expand(2, -1), cache=cache)  # up to 24, all of which are short
    cache.reset()
    ours(_tokens(40).expand(2, -1), cache=cache)
    with pytest.raises(ValueError, match="lengths must be above 24, or all 0"):
        cache.set_lengths([24, 40])
    cache.set_lengths([25, 40])
    cache.set_lengths([0, 0])


def test_what_would_pass_is_refused(ours: GPT) -> None:
    within, beyond = _tokens(20)[0].tolist(), _tokens(30)[0].tolist()
    for prompts in ([within], [within, beyond]):
        with pytest.raises(ValueError, match=r"20 to .* max_new_tokens = 5 some pass 24"):
            ours.generate(prompts, max_new_tokens=5)
    assert ours.generate([within], max_new_tokens=4).shape == (1, 24)
    with pytest.raises(ValueError, match="speculation takes back tokens, and beyond 24"):
        ours.generate([beyond], max_new_tokens=5, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="more than the model's short_positions = 24"):
        Engine(ours, pages=16).submit(within, max_new_tokens=5)
    with pytest.raises(ValueError, match="must fit into the model's short_positions = 24"):
        scoring.score(ours, [scoring.Row(within, beyond)])
    shorter = dataclasses.replace(ours.config, n_positions=SHORT)
    assert shorter.short_positions is None  # no sequence passes it
    with pytest.raises(ValueError, match="rope_scaling of an encoder"):
        EncoderConfig(positions="rotary", rope_scaling={**LONGROPE, "factor": 2.0})


def test_within_speculation_and_batches_change_nothing(ours: GPT) -> None:
    prompts = [_tokens(length)[0].tolist() for length in (14, 3, 9)]
    expected = [ours.generate([prompt], max_new_tokens=10)[0, len(prompt) :] for prompt in prompts]
    for options in ({"draft_model": ours}, {"prompt_lookup_num_tokens": 3}):
        got = ours.generate(prompts, max_new_tokens=10, **options)
        assert all(torch.equal(row[-10:], one) for row, one in zip(got, expected, strict=True))
    engine = Engine(ours, pages=16, page_size=4, prefill_chunk=5)
    requests = [engine.submit(prompt, max_new_tokens=10) for prompt in prompts]
    engine.run()
    for request, one in zip(requests, expected, strict=True):
        assert request.tokens == one.tolist()
