"""generate: the same tokens as transformers, and as each prompt alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from generation.small import Letters, make_prompts, padded

from fastattn import GPT, GPTConfig
from fastattn.generation import decoding, graphs
from fastattn.training import Tokenizer

Pair = tuple[GPT, transformers.GPT2LMHeadModel]
MakePair = Callable[..., Pair]

# Unequal prompts; the longest is not the first.
PROMPTS = make_prompts([5, 17, 1, 11], 97)


def _theirs(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    # Without a mask transformers takes pad_token_id in a prompt for padding.
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    return model.generate(tokens, **{**settings, **kwargs})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_transformers(make_pair: MakePair, batch: int, seed: int) -> None:
    ours, theirs = make_pair(seed=seed)
    tokens = torch.randint(0, 97, (batch, 9), device=ours.device)
    got = ours.generate(tokens, max_new_tokens=55)
    assert got.shape == (batch, 64)
    assert torch.equal(got, _theirs(theirs, tokens, max_new_tokens=55))


@pytest.mark.parametrize("changes", [{}, {"scale_attn_by_inverse_layer_idx": True}], ids=str)
def test_left_padding_equals_transformers(make_pair: MakePair, changes: dict[str, Any]) -> None:
    ours, theirs = make_pair(**changes)
    tokens, mask = padded(PROMPTS, 0, ours.device)
    got = ours.generate(tokens, max_new_tokens=30, attention_mask=mask)
    expected = _theirs(theirs, tokens, max_new_tokens=30, attention_mask=mask)
    assert torch.equal(got, expected)


def _first_repeated_ends(pair: Pair, tokens: torch.Tensor, steps: int) -> list[int]:
    """Tokens that end the rows at different steps, one row (if any) after all others."""
    free = pair[0].generate(tokens, max_new_tokens=steps)[:, tokens.shape[1] :]
    return sorted({int(row[3 + 4 * b]) for b, row in enumerate(free[:-1])})


def test_ends_and_padding_equal_transformers(pair: Pair) -> None:
    ours, theirs = pair
    tokens, mask = padded(PROMPTS, 0, ours.device)
    ends = _first_repeated_ends(pair, tokens, 30)
    for eos in (ends[0], ends):
        settings = {"max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 96}
        got = ours.generate(tokens, attention_mask=mask, **settings)
        expected = _theirs(theirs, tokens, attention_mask=mask, **settings)
        assert torch.equal(got, expected)
    assert (got == 96).any()


def test_stops_when_all_have_ended(pair: Pair) -> None:
    ours, theirs = pair
    tokens = torch.randint(0, 97, (2, 6), device=ours.device)
    free = ours.generate(tokens, max_new_tokens=30)[:, 6:]
    ends = [int(free[0, 4]), int(free[1, 2])]
    got = ours.generate(tokens, max_new_tokens=30, eos_token_id=ends, pad_token_id=0)
    assert got.shape[1] <= 6 + 5
    assert torch.equal(got, _theirs(theirs, tokens, max_new_tokens=30, eos_token_id=ends))


def test_checks_for_the_end_now_and_then(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where some steps are run in vain: they leave no trace."""
    ours, _ = pair
    tokens = torch.randint(0, 97, (2, 6), device=ours.device)
    free = ours.generate(tokens, max_new_tokens=30)[:, 6:]
    ends = [int(free[0, 4]), int(free[1, 2])]
    expected = ours.generate(tokens, max_new_tokens=30, eos_token_id=ends)
    decode, steps = decoding.decode, []
    monkeypatch.setattr(decoding, "decode", lambda *args: (steps.append(1), decode(*args))[1])
    monkeypatch.setattr(decoding, "check_every", lambda *args: 16)
    got = ours.generate(tokens, max_new_tokens=30, eos_token_id=ends)
    assert torch.equal(got, expected) and len(steps) == 15


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(pair: Pair, penalty: float) -> None:
    ours, theirs = pair
    tokens = torch.randint(0, 97, (3, 9), device=ours.device)
    settings = {"max_new_tokens": 40, "repetition_penalty": penalty}
    got = ours.generate(tokens, **settings)
    assert torch.equal(got, _theirs(theirs, tokens, **settings))
    assert not torch.equal(got, ours.generate(tokens, max_new_tokens=40))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_batch_equals_each_prompt_alone(pair: Pair, settings: dict[str, Any]) -> None:
    ours, _ = pair
    seeds: list[Any] = [None] * 4
    if settings.get("do_sample"):
        seeds = [11, 12, 13, 14]
        settings = {**settings, "seed": 11}
    together = ours.generate(PROMPTS, max_new_tokens=40, pad_token_id=0, **settings)
    tokens, mask = padded(PROMPTS, 0, ours.device)
    same = ours.generate(tokens, max_new_tokens=40, attention_mask=mask, **settings)
    assert torch.equal(together, same)
    for row, prompt, seed in zip(together, PROMPTS, seeds, strict=True):
        alone = ours.generate([prompt], max_new_tokens=40, **{**settings, "seed": seed})
        assert torch.equal(row[-len(alone[0]) :], alone[0])


def test_very_unequal_prompts_are_read_in_passes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU; each with its like, and each gets the tokens that it gets alone."""
    model, read = pair[0], []
    prompts = make_prompts((3, 50, 20, 2, 48, 50), 97)
    alone = [model.generate([p], max_new_tokens=6, do_sample=False)[0, -6:] for p in prompts]
    features = type(model).features

    def count(self: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        read.append(tuple(ids.shape))
        return features(self, ids, cache)

    monkeypatch.setattr(type(model), "features", count)
    out = model.generate(prompts, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, -6:], torch.stack(alone))
    passes = [(3, 50), (3, 20)] if model.device.type == "cpu" else [(6, 50)]
    assert read[: len(passes)] == passes


def test_seed_decides_the_draws(pair: Pair) -> None:
    ours, _ = pair

    def sample(seed: Any) -> torch.Tensor:
        return ours.generate(PROMPTS, max_new_tokens=20, do_sample=True, seed=seed)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample([5, 5, 6, 7])[2:], sample([1, 2, 6, 7])[2:])
    generator = torch.Generator(ours.device)
    assert torch.equal(sample(generator.manual_seed(3)), sample(generator.manual_seed(3)))
    torch.manual_seed(4)
    first = sample(None)
    assert not torch.equal(first, sample(None))
    torch.manual_seed(4)
    assert torch.equal(first, sample(None))


def test_top_k_of_one_is_greedy(pair: Pair) -> None:
    ours, _ = pair
    greedy = ours.generate(PROMPTS, max_new_tokens=20)
    assert torch.equal(ours.generate(PROMPTS, max_new_tokens=20, do_sample=True, top_k=1), greedy)


# --- the caller's context -------------------------------------------------------------------------

CONTEXTS: dict[str, Callable[[], Any]] = {
    "default dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: _set(torch.set_default_device, "meta", None),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}


@contextlib.contextmanager
def _set(setter: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=["greedy", "sampling"])
def test_the_context_does_not_count(pair: Pair, settings: dict[str, Any], context: str) -> None:
    ours, _ = pair
    seeds = {"seed": 3} if settings else {}
    expected = ours.generate(PROMPTS, max_new_tokens=8, **settings, **seeds)
    with CONTEXTS[context]():
        got = ours.generate(PROMPTS, max_new_tokens=8, **settings, **seeds)
    assert torch.equal(got, expected)


METHODS: list[dict[str, Any]] = [
    {"num_beams": 3, "no_repeat_ngram_size": 2, "frequency_penalty": 0.5},
    {"num_beams": 3, "do_sample": True, "top_p": 0.9, "seed": 3},
    {"penalty_alpha": 0.6, "top_k": 4, "bad_words_ids": [[3], [4, 5]]},
    {"prompt_lookup_num_tokens": 3, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context_does_not_count_for_any_method(pair: Pair, context: str) -> None:
    ours, _ = pair
    for method in METHODS:
        expected = ours.generate(PROMPTS, max_new_tokens=6, **method)
        with CONTEXTS[context]():
            got = ours.generate(PROMPTS, max_new_tokens=6, **method)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_under_autocast(pair: Pair, method: dict[str, Any]) -> None:
    """The cache is autocast's too; no step fails for a dtype."""
    ours, _ = pair
    with torch.autocast(ours.device.type, dtype=torch.bfloat16):
        out = ours.generate(PROMPTS, max_new_tokens=6, **method)
    assert out.shape == (4, 23) and not out.is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_autocast(make_pair: MakePair, dtype: torch.dtype, weights: torch.dtype) -> None:
    """Each new token is the most probable one by the model on the whole text, under autocast."""
    ours, _ = make_pair(dtype=weights)
    with torch.autocast(ours.device.type, dtype=dtype):
        out = ours.generate(PROMPTS, max_new_tokens=12)
        for row, prompt in zip(out, PROMPTS, strict=True):
            text = row[17 - len(prompt) :]
            with torch.no_grad():
                logits = ours(text[None])[0, len(prompt) - 1 : -1].float()
            best = logits.max(-1).values
            taken = logits.gather(-1, text[len(prompt) :, None]).squeeze(-1)
            # Rounding may swap two that are as good; the largest logits are near 30.
            torch.testing.assert_close(taken, best, atol=0.5, rtol=0)


def test_a_graph_is_kept_for_each_dtype_of_autocast(pair: Pair) -> None:
    ours, _ = pair
    plain = graphs.GraphDecoder(decoding.decode, ours, ours.new_cache(1, 8))
    with torch.autocast(ours.device.type, dtype=torch.bfloat16):
        cast = graphs.GraphDecoder(decoding.decode, ours, ours.new_cache(1, 8))
    assert plain.cache.layers[0].keys.dtype == torch.float32
    assert cast.cache.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("check_every", [1, 16], ids=["at once", "now and then"])
@pytest.mark.parametrize("settings", [SETTINGS[0], *SETTINGS[2:], METHODS[0], METHODS[2]], ids=str)
def test_logits_that_are_no_distribution(
    pair: Pair,
    settings: dict[str, Any],
    check_every: int,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, _ = pair
    monkeypatch.setattr(decoding, "check_every", lambda *args: check_every)
    with torch.no_grad():
        ours.norm_f.bias.fill_(value)  # the head's products are NaN
    with pytest.raises(ValueError, match="the logits of prompt 0 are NaN or infinite by new token"):
        ours.generate(PROMPTS, max_new_tokens=3, **settings)


# --- stop strings ---------------------------------------------------------------------------------

TEXT = ["the cat sat on the mat, and the dog sat on the cat: 天气很好, stop at nothing"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.train(TEXT, vocab_size=300)


@pytest.fixture
def _speller(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the model write a text: `decode` and `prefill` give its tokens one by one."""

    def write(text: str) -> None:
        ids = iter(tokenizer.encode(text) + [0] * 50)

        def step(model: GPT, *rest: Any) -> torch.Tensor:
            logits = torch.zeros(1, 300)
            logits[0, next(ids)] = 1.0
            return logits

        monkeypatch.setattr(decoding, "prefill", step)
        monkeypatch.setattr(decoding, "decode", step)

    return write


@pytest.mark.parametrize(
    ("prompt", "text", "stops"),
    [
        ("the", " cat sat on the mat", "sat"),
        ("the", " cat sat on the mat", ["mat", " on"]),
        ("the", " cat sat on the mat", "at s"),  # over two tokens
        ("the", " cat sat on the mat", "he cat"),  # begun in the prompt
        ("the cat", " sat on the cat", "cat"),  # the prompt's own does not count
        ("the", " dog: 天气很好, stop", "气"),  # of several tokens
        ("the", " dog: 天气很好, stop", "ca"),  # never
    ],
)
def test_stop_strings(
    tokenizer: Any, _speller: Callable[[str], None], prompt: str, text: str, stops: Any
) -> None:
    """The fewest tokens whose text, the prompt's before them, has a stop string that ends in it."""
    model = GPT(GPTConfig(300, 64, 16, 1, 2, eos_token_id=None)).eval()
    ids = tokenizer.encode(prompt)
    _speller(text)
    out = model.generate([ids], max_new_tokens=20, stop_strings=stops, tokenizer=tokenizer)
    new = (tokenizer.encode(text) + [0] * 20)[:20]
    listed = [stops] if isinstance(stops, str) else stops

    def found(count: int) -> int:
        return sum(tokenizer.decode(ids + new[:count]).count(s) for s in listed)

    expected = next((n for n in range(1, 21) if found(n) > found(0)), 20)
    assert out[0, len(ids) :].tolist() == new[:expected]


def test_stop_strings_equal_transformers(
    make_pair: MakePair, tokenizer: Any, tmp_path: Any
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours, theirs = make_pair(vocab_size=len(theirs_tokenizer))
    for seed in range(4):
        prompt = torch.randint(
            1, 97, (1, 6), generator=torch.Generator().manual_seed(seed), device="cpu"
        ).to(ours.device)
        free = ours.generate(prompt, max_new_tokens=20)[0, 6:].tolist()
        # Whole characters, so that both see the same text.
        text = theirs_tokenizer.decode(free[4:9]).replace("\ufffd", "")
        if not text:
            continue
        settings = {"max_new_tokens": 20, "stop_strings": [text[-2:]]}
        got = ours.generate(prompt, tokenizer=theirs_tokenizer, **settings)
        expected = _theirs(theirs, prompt, tokenizer=theirs_tokenizer, **settings)
        assert torch.equal(got, expected)


def test_rows_end_by_their_own_texts(pair: Pair) -> None:
    ours, _ = pair
    free = ours.generate(PROMPTS, max_new_tokens=12)[:, 17:]
    stops = [chr(0x4E00 + int(free[0, 3])), Letters().decode(free[1, 5:7].tolist())]
    got = ours.generate(
        PROMPTS, max_new_tokens=12, pad_token_id=96, stop_strings=stops, tokenizer=Letters()
    )[:, 17:]
    for row, whole, prompt in zip(got.tolist(), free.tolist(), PROMPTS, strict=True):
        ends = [
            n
            for n in range(1, 13)
            if any(Letters().decode(prompt + whole[:n]).endswith(s) for s in stops)
        ]
        n = ends[0] if ends else 12
        assert row[:n] == whole[:n] and set(row[n:]) <= {96}


def test_on_token_sees_each_step(pair: Pair) -> None:
    ours, _ = pair
    free = ours.generate(PROMPTS, max_new_tokens=10)[:, 17:]
    steps: list[torch.Tensor] = []
    got = ours.generate(
        PROMPTS,
        max_new_tokens=10,
        eos_token_id=sorted(set(free[:, 4].tolist())),
        pad_token_id=96,
        on_token=lambda tokens: steps.append(tokens.clone()),
    )
    assert torch.equal(torch.stack(steps, dim=1), got[:, 17:])
    assert 1 <= len(steps) <= 5


def test_an_error_in_on_token_passes_through(pair: Pair) -> None:
    ours, _ = pair
    ours.train()
    with pytest.raises(ZeroDivisionError):
        ours.generate([[1]], max_new_tokens=3, on_token=lambda tokens: 1 / 0)
    assert ours.training


def test_special_tokens_of_the_config(make_pair: MakePair) -> None:
    ours, _ = make_pair()
    free = ours.generate([[1, 2, 3]], max_new_tokens=8)[0, 3:].tolist()
    ours, theirs = make_pair(eos_token_id=free[3], pad_token_id=96)
    stopped = ours.generate([[1, 2, 3], [4]], max_new_tokens=8)
    assert stopped[1, :2].tolist() == [96, 96]
    assert stopped[0, 3 : 4 + free.index(free[3])].tolist() == free[: 1 + free.index(free[3])]
    alone = ours.generate([[1, 2, 3]], max_new_tokens=8)
    expected = theirs.generate(alone[:, :3], max_new_tokens=8, do_sample=False)
    assert torch.equal(alone, expected) and alone.shape[1] < 11
    assert ours.generate([[1, 2, 3]], max_new_tokens=8, eos_token_id=()).shape[1] == 11

    # Outside of the vocabulary, as where only vocab_size was changed: as if not there.
    beyond, _ = make_pair(eos_token_id=[50256, -1], pad_token_id=50257)
    out = beyond.generate([[1, 2, 3], [4]], max_new_tokens=8)
    assert out[0, 3:].tolist() == free and out[1, :2].tolist() == [0, 0]


def test_dropout_is_off_and_modes_come_back(make_pair: MakePair) -> None:
    ours, theirs = make_pair(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    tokens = torch.randint(0, 97, (1, 6), device=ours.device)
    expected = _theirs(theirs, tokens, max_new_tokens=20)
    ours.train()
    ours.blocks[1].eval()
    modes = [module.training for module in ours.modules()]
    assert torch.equal(ours.generate(tokens, max_new_tokens=20), expected)
    assert [module.training for module in ours.modules()] == modes


def test_result_can_be_trained_on(pair: Pair) -> None:
    ours, _ = pair
    out = ours.generate([[1, 2]], max_new_tokens=4)
    _, loss = ours(out[:, :-1], out[:, 1:])
    loss.backward()
    assert not out.is_inference() and ours.wte.weight.grad is not None


def test_bfloat16(make_pair: MakePair) -> None:
    ours, _ = make_pair(dtype=torch.bfloat16)
    out = ours.generate(PROMPTS, max_new_tokens=20, do_sample=True, top_p=0.9, seed=0)
    assert out.shape == (4, 37) and out.dtype == torch.int64


def test_prompt_and_new_tokens_may_fill_the_context(pair: Pair) -> None:
    ours, _ = pair
    assert ours.generate([[1] * 60, [2]], max_new_tokens=4).shape == (2, 64)
    with pytest.raises(ValueError, match=r"60 tokens; with max_new_tokens = 5 .* n_positions = 64"):
        ours.generate([[1] * 60, [2]], max_new_tokens=5)


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("ids", "kwargs", "error", "message"),
    [
        ("abc", {}, TypeError, "each prompt of input_ids must be a list of integers, got 'a' at 0"),
        (3, {}, TypeError, "input_ids must be a tensor .* or a list of lists .*, got int"),
        ([], {}, ValueError, "input_ids must have at least one prompt"),
        ([[1], []], {}, ValueError, "each prompt of input_ids must have a token, got none at 1"),
        ([1, 2], {}, TypeError, "each prompt of input_ids must be a list of integers, got 1 at 0"),
        ([[1.0]], {}, TypeError, "each prompt of input_ids must be a list of integers"),
        ([[1], [97]], {}, ValueError, "input_ids must be from 0 .* = 96, got 97 in prompt 1"),
        (IDS - 2, {}, ValueError, "input_ids must be from 0 .* = 96, got -1 in prompt 0"),
        (IDS.float(), {}, TypeError, "input_ids must be int32 or int64.*got torch.float32"),
        (IDS[0], {}, ValueError, r"input_ids must have the shape \(batch, seqlen\).*got \(3,\)"),
        (IDS[:, :0], {}, ValueError, r"input_ids must have the shape .*got \(1, 0\)"),
        ([[1]], {"attention_mask": IDS}, ValueError, "attention_mask goes with a tensor"),
        (
            IDS,
            {"attention_mask": [1]},
            TypeError,
            "attention_mask must be a torch.Tensor, got list",
        ),
        (IDS, {"attention_mask": IDS[:, 1:]}, ValueError, r"attention_mask must have .*\(1, 2\)"),
        (IDS, {"attention_mask": IDS}, ValueError, "attention_mask must be 1 for tokens and 0"),
        (
            IDS,
            {"attention_mask": torch.tensor([[1, 1, 0]])},
            ValueError,
            "attention_mask must hide only padding on the left",
        ),
        (
            IDS,
            {"attention_mask": torch.tensor([[1, 0, 1]])},
            ValueError,
            "only padding on the left",
        ),
        (IDS, {"attention_mask": torch.tensor([[0, 0, 0]])}, ValueError, "no prompt's last token"),
        (IDS, {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        (IDS, {"max_new_tokens": 1.0}, TypeError, "max_new_tokens must be an integer, got 1.0"),
        (IDS, {"eos_token_id": 97}, ValueError, "eos_token_id must be from 0 .* = 96, got 97"),
        (IDS, {"eos_token_id": [1, -1]}, ValueError, r"eos_token_id must be .*got \[1, -1\]"),
        (IDS, {"pad_token_id": "x"}, TypeError, "pad_token_id must be a token id, got 'x'"),
        (IDS, {"temperature": 0.5}, ValueError, "temperature would have no effect"),
        (IDS, {"seed": 0}, ValueError, "seed would have no effect: give do_sample=True too"),
        (IDS, {"do_sample": True, "seed": [0, 1]}, ValueError, "each of 1 sequences, got 2"),
        (IDS, {"stop_strings": "x"}, ValueError, "give tokenizer=.*got None"),
        (IDS, {"stop_strings": []}, ValueError, r"at least one string, .*got \[\]"),
        (IDS, {"stop_strings": ["a", ""]}, ValueError, "no empty one"),
        (IDS, {"stop_strings": [1]}, TypeError, "must be a string or a list of them, got .1."),
    ],
)
def test_bad_input(
    pair: Pair, ids: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    ours, _ = pair
    with pytest.raises(error, match=message):
        ours.generate(ids, **{"max_new_tokens": 3, **kwargs})
