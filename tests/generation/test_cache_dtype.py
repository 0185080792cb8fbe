"""Generation with a cache of 8-bit numbers: each sequence's tokens are those of its prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.small import make_prompts
from generation.test_engine import GEMMA, Arrivals, _model

from fastattn import GPT
from fastattn.cli import main
from fastattn.generation import Engine
from fastattn.models import EncoderDecoder, EncoderDecoderConfig
from fastattn.nn.stored_cache import FIRST, NAMES

KINDS = pytest.mark.parametrize("kind", NAMES)
METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3},
    "beams": {"num_beams": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 4},
}
# The lengths around the first tokens, which decide on the scales.
LENGTHS = (1, 5, FIRST - 1, FIRST, FIRST + 1, 30)
PROMPTS = make_prompts(LENGTHS, vocab_size=88, seed=1)


@pytest.fixture(scope="module")
def model(device: str) -> GPT:
    return _model(device)


@KINDS
@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_its_prompt_alone(model: GPT, kind: str, method: str) -> None:
    how: dict[str, Any] = {**METHODS[method], "max_new_tokens": 12, "cache_dtype": kind}
    together = model.generate(PROMPTS, **how)[:, max(LENGTHS) :]
    for row, prompt in enumerate(PROMPTS):
        if method == "sampling":
            how["seed"] = 3 + row
        alone = model.generate([prompt], **how)[0, len(prompt) :].tolist()
        assert together[row, : len(alone)].tolist() == alone


def test_a_draft_has_the_same_cache(model: GPT) -> None:
    how: dict[str, Any] = {"max_new_tokens": 12, "cache_dtype": "int8"}
    expected = model.generate(PROMPTS, **how)
    assert torch.equal(model.generate(PROMPTS, draft_model=model, **how), expected)


@KINDS
def test_greedy_tokens_are_nearly_the_best(model: GPT, kind: str) -> None:
    """By the exact logits each is less than a tenth of their deviation below the best."""
    prompts = torch.tensor([PROMPTS[-1][:20], PROMPTS[-1][10:]], device=model.device)
    tokens = model.generate(prompts, max_new_tokens=20, eos_token_id=(), cache_dtype=kind)
    with torch.no_grad():
        logits = model(tokens)[:, 19:-1]
    chosen = logits.gather(2, tokens[:, 20:, None]).squeeze(2)
    assert (logits.amax(2) - chosen < 0.1 * logits.std(2)).all()


@KINDS
@pytest.mark.parametrize(
    ("changes", "page_size", "pages", "chunk"),
    [
        ({}, 4, 30, 12),
        pytest.param(GEMMA, 16, 64, 512, marks=pytest.mark.long),
        pytest.param({}, 3, 21, 1, marks=pytest.mark.long),
        pytest.param(GEMMA, 1, 90, 7, marks=pytest.mark.long),
    ],
)
def test_an_engines_requests(
    kind: str, changes: dict[str, Any], page_size: int, pages: int, chunk: int, device: str
) -> None:
    """Whatever else runs, is preempted, or has the same beginning."""
    model = _model(device, **changes)
    engine = Engine(
        model, pages=pages, page_size=page_size, max_batch=8, prefill_chunk=chunk, cache_dtype=kind
    )
    arrivals = Arrivals(engine, 0)
    for _ in range(40):
        arrivals.submit()
        engine.step()
    engine.run()
    arrivals.check(model, cache_dtype=kind)
    assert engine.reused > 0
    assert engine.preempted > 0 or pages == 64


@KINDS
def test_short_prompts_of_one_step(model: GPT, kind: str) -> None:
    """Lengths that the engine reads in one call, padded, where no scales are to be fixed."""
    prompts = make_prompts([8 + i % 8 for i in range(16)], vocab_size=88, seed=2)
    engine = Engine(model, pages=200, page_size=4, cache_dtype=kind)
    asked = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
    engine.run()
    for request in asked:
        alone = model.generate([request.prompt], max_new_tokens=12, cache_dtype=kind)
        assert request.tokens == alone[0, len(request.prompt) :].tolist()


def test_pages_of_other_scales_are_not_shared(model: GPT) -> None:
    """A prompt of fewer tokens has scales of its own, though its answer may go on as another."""
    engine = Engine(model, pages=40, page_size=4, cache_dtype="int8")
    short = engine.submit([5, 6, 7], max_new_tokens=30, eos_token_id=())
    engine.run()
    again = engine.submit(short.prompt + short.tokens[:20], max_new_tokens=5, eos_token_id=())
    engine.run()
    assert engine.reused == 0
    third = engine.submit(short.prompt + short.tokens[:20], max_new_tokens=5, eos_token_id=())
    engine.run()
    assert engine.reused == 20
    assert third.tokens == again.tokens


@KINDS
def test_the_bytes_of_a_cache(model: GPT, kind: str) -> None:
    """A quarter of float32's, and 4 bytes for each sequence, layer, key head, of keys and values."""

    def held(engine: Engine) -> int:
        memory = engine._memory
        scales = 0 if memory.scales is None else memory.scales.nbytes
        return scales + sum(x.nbytes for layer in memory.layers for x in layer[:2])

    config = model.config
    plain, stored = (Engine(model, pages=9, page_size=8, cache_dtype=k) for k in (None, kind))
    numbers = 2 * config.n_layer * config.n_embd * 10 * 8
    assert held(plain) == 4 * numbers
    assert held(stored) == numbers + 4 * 2 * config.n_layer * config.n_head * 10


def test_an_unknown_dtype(model: GPT, capsys: pytest.CaptureFixture[str]) -> None:
    words = r"cache_dtype must be 'int8' or 'float8', or None for the model's; got 'int4'"
    with pytest.raises(ValueError, match=words):
        model.generate([[1]], max_new_tokens=1, cache_dtype="int4")
    with pytest.raises(ValueError, match=words):
        Engine(model, pages=4, cache_dtype="int4")
    for command in (["generate", "folder", "text"], ["chat", "folder"], ["serve", "folder"]):
        with pytest.raises(SystemExit):
            main([*command, "--cache-dtype", "int4"])
        assert "--cache-dtype: invalid choice: 'int4'" in capsys.readouterr().err


def test_an_encoder_decoder_has_none() -> None:
    config = EncoderDecoderConfig(d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(ValueError, match="cache_dtype='int8' is for decoders"):
        EncoderDecoder(config).generate([[1]], max_new_tokens=1, cache_dtype="int8")
