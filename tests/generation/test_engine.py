"""Engine: each request's tokens are those of its prompt alone, whatever else runs."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from generation.small import Letters, make_model
from generation.test_graphs import _capture, on_a_gpu

from fastattn import GPT
from fastattn.generation import Engine, Request, Sampling, graphs

END = 88


def _model(device: str, **changes: Any) -> GPT:
    config = {"vocab_size": 97, "initializer_range": 0.2, "eos_token_id": END}
    return make_model(device=device, **{**config, **changes})


@pytest.fixture(scope="module")
def model(device: str) -> GPT:
    return _model(device)


# Grouped queries, rotary positions, a window in every other layer, a cap.
GEMMA = {
    "n_kv_head": 2, "positions": "rotary", "norm": "rms_norm", "gated": True, "sliding_window": 9,
    "layer_types": ("sliding_attention", "full_attention"), "attn_logit_softcapping": 20.0,
}  # fmt: skip


def _alone(model: GPT, request: Request, **arguments: Any) -> list[int]:
    """The tokens of its prompt by `generate`."""
    out = model.generate([request.prompt], max_new_tokens=request.max_new_tokens, **arguments)
    return out[0, len(request.prompt) :].tolist()


def _prompt(rng: random.Random, shortest: int, longest: int) -> list[int]:
    return [rng.randrange(97) for _ in range(rng.randint(shortest, longest))]


SAMPLED = (
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
    {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 1.5, "min_p": 0.1, "presence_penalty": 0.7},
)


class Arrivals:
    """Random requests to an engine; a third greedy, some with the beginning of others."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.rng = engine, random.Random(seed)
        self.beginnings = [_prompt(self.rng, 9, 30) for _ in range(3)]
        self.requests: list[tuple[Request, dict[str, Any]]] = []

    def submit(self) -> Request:
        rng, number = self.rng, len(self.requests)
        prompt = _prompt(rng, 1, 20)
        if number % 4 == 0:
            prompt = rng.choice(self.beginnings) + prompt
        how = {} if number % 3 == 0 else SAMPLED[number % len(SAMPLED)]
        seed = {"seed": rng.randrange(2**64)} if how else {}
        new = rng.randint(1, 64 - len(prompt)) if number % 5 == 0 else rng.randint(1, 12)
        request = self.engine.submit(prompt, max_new_tokens=new, sampling=Sampling(**how), **seed)
        self.requests.append((request, {**how, **seed}))
        return request

    def drive(self, count: int, most_steps: int, cancelled: float) -> None:
        """Submit so many, with some steps after each; a share is cancelled."""
        for _ in range(count):
            self.submit()
            for _ in range(self.rng.randrange(most_steps)):
                self.engine.step()
            if self.rng.random() < cancelled:
                self.rng.choice(self.requests)[0].cancel()
        self.engine.run()

    def check(self, model: GPT, **arguments: Any) -> None:
        for request, how in self.requests:
            expected = _alone(model, request, **how, **arguments)
            if request.finish_reason == "cancelled":
                assert request.tokens == expected[: len(request.tokens)]
            else:
                assert request.tokens == expected
                assert request.finish_reason == ("stop" if expected[-1] == END else "length")
        assert self.engine.free_pages == self.engine.pages


long = pytest.mark.long


# Few pages; all that runs fits. Then pages of one token; one prompt token a step, in few pages.
@pytest.mark.parametrize(
    ("changes", "page_size", "pages", "max_batch", "chunk"),
    [
        ({}, 4, 30, 8, 12),
        ({}, 16, 64, 64, 512),
        pytest.param({}, 1, 90, 9, 7, marks=long),
        pytest.param({}, 3, 21, 64, 1, marks=long),
        (GEMMA, 4, 30, 8, 12),
        pytest.param(GEMMA, 3, 21, 64, 5, marks=long),
    ],
    ids=lambda value: value if isinstance(value, int) else "Gemma" if value else "GPT-2",
)
def test_64_random_arrivals(
    changes: dict[str, Any], page_size: int, pages: int, max_batch: int, chunk: int, device: str
) -> None:
    model = _model(device, **changes)
    serving = Engine(
        model, pages=pages, page_size=page_size, max_batch=max_batch, prefill_chunk=chunk
    )
    arrivals = Arrivals(serving, seed=page_size)
    arrivals.drive(64, most_steps=4, cancelled=0.1)
    arrivals.check(model)
    reasons = {request.finish_reason for request, _ in arrivals.requests}
    assert reasons == {"stop", "length", "cancelled"}
    assert serving.reused > 0
    assert (serving.preempted > 0) == (page_size < 16)


@long
@pytest.mark.parametrize("seed", range(8))
def test_random_arrivals_of_random_engines(model: GPT, seed: int) -> None:
    rng = random.Random(seed)
    page_size = rng.randint(1, 20)
    serving = Engine(
        model,
        pages=-(-64 // page_size) + rng.randrange(40),
        page_size=page_size,
        max_batch=rng.randint(1, 20),
        prefill_chunk=rng.randint(1, 100),
    )
    arrivals = Arrivals(serving, seed)
    arrivals.drive(40, most_steps=5, cancelled=0.2)
    arrivals.check(model)


@pytest.mark.parametrize(
    "where", ["stand-in", pytest.param("cuda", marks=[pytest.mark.gpu, on_a_gpu])]
)
def test_decoding_by_graphs(model: GPT, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def capture(decoder: graphs.GraphDecoder) -> graphs.GraphDecoder:
        captured.append(decoder.cache.batch_size)
        return _capture(decoder) if where == "stand-in" else original(decoder)

    original = graphs.GraphDecoder.capture
    monkeypatch.setattr(graphs.GraphDecoder, "capture", capture)
    monkeypatch.setattr(graphs, "captures", lambda model: True)
    serving = Engine(model, pages=20, page_size=4, max_batch=7, prefill_chunk=16)
    arrivals = Arrivals(serving, seed=2)
    for _ in range(24):
        arrivals.submit()
        serving.step()
    serving.run()
    monkeypatch.undo()
    arrivals.check(model)
    assert len(captured) == len(set(captured)) and set(captured) <= {1, 2, 4, 8}
    assert serving.preempted > 0


def test_equal_beginnings_are_held_once(model: GPT) -> None:
    rng = random.Random(0)
    beginning = _prompt(rng, 32, 32)
    serving = Engine(model, pages=20, page_size=4)
    first = serving.submit([*beginning, 1], max_new_tokens=8, eos_token_id=())
    serving.step()
    taken = serving.pages - serving.free_pages
    others = [
        serving.submit([*beginning, last], max_new_tokens=8, eos_token_id=())
        for last in range(2, 8)
    ]
    serving.step()
    # Eight pages are shared; one is each one's own, in which its second token goes, too.
    assert taken == 9 and serving.pages - serving.free_pages == 9 + len(others)
    assert serving.reused == 32 * len(others)
    serving.run()
    for request in [first, *others]:
        assert request.tokens == _alone(model, request, eos_token_id=())


def test_a_beginning_is_found_after_its_request_has_ended(model: GPT) -> None:
    prompt = _prompt(random.Random(1), 33, 33)
    serving = Engine(model, pages=16, page_size=4)
    for reused in (0, 32):
        request = serving.submit(prompt, max_new_tokens=4, eos_token_id=())
        serving.run()
        assert serving.reused == reused and request.tokens == _alone(
            model, request, eos_token_id=()
        )
    changed = [prompt[0] ^ 1, *prompt[1:]]  # from its second page on it is the same
    request = serving.submit(changed, max_new_tokens=20)
    serving.run()
    assert serving.reused == 32 and request.tokens == _alone(model, request)
    # By now its pages have been taken: it is read again.
    again = serving.submit(prompt, max_new_tokens=4)
    serving.run()
    assert again.tokens == _alone(model, again) and serving.reused < 64


def test_a_whole_prompt_in_pages_is_read_from_its_last_page_on(model: GPT) -> None:
    prompt = _prompt(random.Random(2), 32, 32)
    serving = Engine(model, pages=16, page_size=4)
    for reused in (0, 28):
        request = serving.submit(prompt, max_new_tokens=4)
        serving.run()
        assert serving.reused == reused and request.tokens == _alone(model, request)


def test_the_youngest_is_preempted(model: GPT) -> None:
    serving = Engine(model, pages=8, page_size=4)
    old = serving.submit([1, 2, 3], max_new_tokens=29, eos_token_id=())
    young = serving.submit([4, 5, 6], max_new_tokens=29, eos_token_id=())
    while not old.finished:
        serving.step()
    assert serving.preempted > 0 and not young.finished and 0 < len(young.tokens) < 29
    serving.run()
    for request in (old, young):
        assert request.tokens == _alone(model, request, eos_token_id=())


def test_cancelling_frees_the_pages(model: GPT) -> None:
    serving = Engine(model, pages=16, page_size=4, max_batch=1)
    running, waiting, last = (serving.submit([n] * 9, max_new_tokens=50) for n in (1, 2, 3))
    serving.step()
    waiting.cancel()
    assert serving.step() and waiting.finish_reason == "cancelled" and waiting.tokens == []
    before = list(running.tokens)
    running.cancel()
    serving.step()
    assert running.finish_reason == "cancelled" and running.tokens == before
    serving.run()
    assert last.tokens == _alone(model, last)
    last.cancel()
    assert not serving.step() and last.finish_reason != "cancelled"


def test_iterating_steps_the_engine(model: GPT) -> None:
    serving = Engine(model, pages=40, page_size=4)
    requests = [serving.submit([n, 7], max_new_tokens=9, eos_token_id=()) for n in range(3)]
    seen = []
    for count, token in enumerate(requests[0], 1):
        seen.append(token)
        assert count == len(requests[0].tokens)
    assert [len(request.tokens) for request in requests] == [9, 9, 9]
    assert seen == requests[0].tokens == list(requests[0])


def test_threads_submit_iterate_and_cancel(model: GPT) -> None:
    serving = Engine(model, pages=40, page_size=4, max_batch=5)
    got: dict[int, tuple[Request, list[int]]] = {}

    def work(number: int) -> None:
        for turn in range(3):
            request = serving.submit([number, turn + 1, number], max_new_tokens=12)
            tokens = []
            for token in request:
                tokens.append(token)
                if number == 0 and len(tokens) == 3:
                    request.cancel()
            got[10 * number + turn] = request, tokens

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 18 and serving.free_pages == serving.pages
    for request, tokens in got.values():
        assert tokens == request.tokens
        assert tokens == _alone(model, request)[: len(tokens)]
        assert request.finish_reason != "error"


def test_stop_strings(model: GPT) -> None:
    tokenizer = Letters()
    ids = torch.arange(97)[None]
    free = model.generate(ids[:, :4], max_new_tokens=20, eos_token_id=())[0, 4:].tolist()
    stop = tokenizer.decode(free[6:9])
    serving = Engine(model, pages=16, tokenizer=tokenizer)
    request = serving.submit(ids[0, :4], max_new_tokens=20, eos_token_id=(), stop_strings=stop)
    other = serving.submit(ids[0, :4], max_new_tokens=20, eos_token_id=())
    serving.run()
    expected = _alone(model, request, eos_token_id=(), stop_strings=stop, tokenizer=tokenizer)
    assert request.finish_reason == "stop"
    assert (
        request.tokens == [t for t, _ in zip(expected, request.tokens)] and len(request.tokens) < 20
    )
    assert other.tokens == free


def test_a_request_that_fails_does_not_harm_others() -> None:
    model = _model("cpu", tie_word_embeddings=False, eos_token_id=None)
    with torch.no_grad():
        model.wte.weight[96] = float("nan")
        model.lm_head.weight[96] = 0  # no sane sequence comes to it

    def refuse(token: int) -> None:
        raise OverflowError("enough")

    def without_threes(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if 3 in ids:
            raise KeyError("three")
        return logits

    ended = []
    serving = Engine(model, pages=12, page_size=4)
    sane = serving.submit([1, 2, 3, 4, 5], max_new_tokens=9, on_finish=ended.append)
    nan = serving.submit([1, 2, 3, 4, 96], max_new_tokens=9, on_finish=ended.append)
    full = serving.submit([3], max_new_tokens=9, on_token=refuse, on_finish=ended.append)
    processed = {"sampling": Sampling(logits_processor=without_threes), "max_new_tokens": 1}
    fine, three = (serving.submit([n], **processed) for n in (2, 3))
    serving.run()
    assert (fine.finish_reason, three.finish_reason) == ("length", "error")
    with pytest.raises(KeyError, match="three"):
        list(three)
    assert (sane.finish_reason, nan.finish_reason, full.finish_reason) == (
        "length",
        "error",
        "error",
    )
    with pytest.raises(ValueError, match="are NaN or infinite by new token 0"):
        list(nan)
    with pytest.raises(OverflowError, match="enough"):
        list(full)
    assert sane.tokens == _alone(model, sane)
    assert ended == [nan, full, sane] and serving.free_pages == 12
    # Pages that held NaN are taken by others.
    later = [serving.submit([n] * 7, max_new_tokens=9) for n in range(9)]
    serving.run()
    assert all(request.tokens == _alone(model, request) for request in later)


def test_a_callback_may_submit_and_cancel_but_not_step(model: GPT) -> None:
    serving = Engine(model, pages=12, page_size=4)
    more: list[Request] = []

    def submit(token: int) -> None:
        if not more:
            more.append(serving.submit([token], max_new_tokens=3))
        elif len(first.tokens) == 3:
            first.cancel()

    first = serving.submit([1, 2], max_new_tokens=9, eos_token_id=(), on_token=submit)
    nested = serving.submit([1, 2], max_new_tokens=9, on_token=lambda token: serving.step())
    serving.run()
    assert first.finish_reason == "cancelled" and len(first.tokens) == 3
    assert more[0].tokens == _alone(model, more[0])
    with pytest.raises(RuntimeError, match="step was called from on_token"):
        list(nested)


def test_a_model_that_fails_ends_what_runs(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Engine(model, pages=12, page_size=4, max_batch=1)
    requests = [serving.submit([1, 2], max_new_tokens=9) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(model, "features", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        with pytest.raises(MemoryError) as caught:
            serving.step()
    serving.fail(caught.value)
    assert [request.finish_reason for request in requests] == ["error", "error"]
    with pytest.raises(MemoryError, match="none left"):
        list(requests[1])
    later = serving.submit([1, 2], max_new_tokens=9)
    serving.run()
    assert later.tokens == _alone(model, later) and serving.free_pages == 12


def test_training_mode_comes_back(model: GPT) -> None:
    serving = Engine(model, pages=12)
    model.train()
    try:
        serving.submit([1, 2], max_new_tokens=2)
        serving.run()
        assert model.training and model.blocks[0].training
    finally:
        model.eval()


def test_numbers_without_a_seed_are_torchs(model: GPT) -> None:
    def tokens() -> list[int]:
        torch.manual_seed(3)
        serving = Engine(model, pages=12)
        request = serving.submit([1], max_new_tokens=20, sampling=Sampling(True), eos_token_id=())
        serving.run()
        return request.tokens

    assert tokens() == tokens()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_ids": []}, ValueError, "must have a token"),
        ({"prompt_ids": [97]}, ValueError, "from 0 to vocab_size - 1 = 96, got 97"),
        ({"prompt_ids": "abc"}, TypeError, "must be a list of integers"),
        ({"prompt_ids": torch.ones(2, 2).long()}, TypeError, "must be a list of integers"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer"),
        ({"max_new_tokens": 62}, ValueError, r"3 tokens; .* is 65, more than .* n_positions = 64"),
        ({"max_new_tokens": 39}, ValueError, r"they need 11 pages of 4 tokens, and .* has 10"),
        ({"sampling": Sampling(suppress_tokens=[97])}, ValueError, "suppress_tokens must be from 0"),
        ({"sampling": {"top_k": 3}}, TypeError, "sampling must be a Sampling, got dict"),
        ({"seed": 3}, ValueError, "seed would have no effect"),
        ({"sampling": Sampling(True), "seed": 2**64}, ValueError, "the seed of sequence 0"),
        ({"eos_token_id": 97}, ValueError, "eos_token_id must be from 0"),
        ({"stop_strings": "a"}, ValueError, "give tokenizer="),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused(
    model: GPT, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    serving = Engine(model, pages=10, page_size=4)
    other = serving.submit([1, 2], max_new_tokens=5)
    given = {"prompt_ids": [1, 2, 3], "max_new_tokens": 5, **arguments}
    with pytest.raises(error, match=message):
        serving.submit(given.pop("prompt_ids"), **given)
    serving.run()
    assert other.tokens == _alone(model, other)


def test_the_longest_request_that_fits(model: GPT) -> None:
    serving = Engine(model, pages=10, page_size=4)
    request = serving.submit([1, 2, 3], max_new_tokens=38, eos_token_id=())
    serving.run()
    assert request.tokens == _alone(model, request, eos_token_id=())


@pytest.mark.parametrize("name", ["pages", "page_size", "max_batch", "prefill_chunk"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_sizes_are_checked(model: GPT, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name} must be"):
        Engine(model, **{"pages": 4, name: value})


@pytest.mark.parametrize("both", [True, False])
def test_other_models_are_refused(both: bool) -> None:
    class Encoder(torch.nn.Module):
        config = type("Config", (), {"is_encoder_decoder": both})

    with pytest.raises(TypeError, match="Engine serves decoders, and Encoder is not one"):
        Engine(Encoder(), pages=4)  # type: ignore[arg-type]
