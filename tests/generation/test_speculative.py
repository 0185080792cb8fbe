"""Speculation: the same greedy tokens, the same distribution of drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation.small import Letters, make_model, make_prompts

from fastattn import GPT
from fastattn.generation.sampling import Sampling
from fastattn.generation.speculative import look_up

PROMPTS = make_prompts([5, 12, 1])


def _near(model: GPT, by: float) -> GPT:
    """A draft that is often right."""
    draft = make_model(1)
    draft.load_state_dict(model.state_dict())
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return draft


DRAFTS: dict[str, Callable[[GPT], dict[str, Any]]] = {
    "itself": lambda model: {"draft_model": model},
    "near": lambda model: {"draft_model": _near(model, 0.03), "num_assistant_tokens": 3},
    "another": lambda model: {"draft_model": make_model(5, n_layer=1), "num_assistant_tokens": 7},
    "lookup": lambda model: {"prompt_lookup_num_tokens": 4},
    "lookup of 3": lambda model: {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 3},
}


@pytest.mark.parametrize("how", DRAFTS)
def test_greedy_tokens_are_the_same(how: str) -> None:
    """Of unequal prompts, up to the end of the context, with ends on the way."""
    model, prompts = make_model(), PROMPTS
    speculation = DRAFTS[how](model)
    free = model.generate(prompts, max_new_tokens=52)
    assert torch.equal(model.generate(prompts, max_new_tokens=52, **speculation), free)
    ends = sorted({int(free[row, 12 + 9 * row]) for row in (1, 2)})
    every = {"max_new_tokens": 30, "eos_token_id": ends, "pad_token_id": 60}
    expected = model.generate(prompts, **every)
    assert torch.equal(model.generate(prompts, **every, **speculation), expected)


def test_greedy_tokens_with_processors_and_stop_strings() -> None:
    model, prompts = make_model(), PROMPTS
    every: dict[str, Any] = {"max_new_tokens": 20, "repetition_penalty": 1.2, "eos_token_id": 7}
    every |= {"no_repeat_ngram_size": 3, "min_new_tokens": 6, "frequency_penalty": 0.5}
    every |= {"forced_eos_token_id": 7, "logits_processor": lambda ids, logits: logits.roll(1, -1)}
    free = model.generate(prompts, **every)
    every |= {"stop_strings": Letters().decode(free[0, 18:20].tolist()), "tokenizer": Letters()}
    expected = model.generate(prompts, **every)
    for how in ("near", "lookup"):
        assert torch.equal(model.generate(prompts, **every, **DRAFTS[how](model)), expected)


@pytest.mark.parametrize(("how", "most"), [("itself", 1 + 4), ("lookup", 23)])
def test_guesses_save_reading(how: str, most: int) -> None:
    """24 tokens in few rounds: of 1 + 5 where the draft, the model's copy, is never wrong."""
    model, prompts = make_model(), PROMPTS
    speculation = {"draft_model": _near(model, 0.0)} if how == "itself" else DRAFTS[how](model)
    features, widths = model.features, []

    def counted(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        widths.append(ids.shape[1])
        return features(ids, cache)

    model.features = counted  # type: ignore[method-assign]
    model.generate(prompts, max_new_tokens=24, **speculation)
    assert len(widths) <= most


def test_a_loop_is_looked_up() -> None:
    model = make_model()
    looped = model.generate([[3] * 20], max_new_tokens=20, **DRAFTS["lookup"](model))
    assert torch.equal(looped, model.generate([[3] * 20], max_new_tokens=20))


@pytest.mark.parametrize(
    ("text", "ngram", "count", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 2, 2, [3, 4]),
        ([1, 2, 9, 8, 2, 7, 1, 2], 2, 2, [9, 8]),  # the longer run counts
        ([1, 2, 9, 8, 2, 7, 1, 2], 1, 2, [7, 1]),  # the last one counts
        ([5, 6, 5, 6], 2, 5, [5, 6, 5, 6, 5]),  # goes on with itself
        ([1, 2, 3], 2, 4, []),
        ([1], 2, 4, []),
        ([1, 2, 1], 2, 0, []),
    ],
)
def test_look_up(text: list[int], ngram: int, count: int, expected: list[int]) -> None:
    assert look_up(text, ngram, count) == expected


SAMPLING = {"do_sample": True, "temperature": 1.3, "top_p": 0.9}


def test_lookup_draws_the_same_tokens() -> None:
    model, prompts = make_model(), [p + p for p in PROMPTS]
    expected = model.generate(prompts, max_new_tokens=30, seed=3, **SAMPLING)
    got = model.generate(prompts, max_new_tokens=30, seed=3, prompt_lookup_num_tokens=4, **SAMPLING)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("how", ["itself", "near", "another", "lookup"])
def test_a_batch_equals_each_prompt_alone(how: str) -> None:
    model, prompts = make_model(), PROMPTS
    every = {"max_new_tokens": 25, "eos_token_id": [1, 2], "pad_token_id": 60, **SAMPLING}
    every |= DRAFTS[how](model)
    together = model.generate(prompts, seed=4, **every)
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], seed=4 + row, **every)[0]
        ours = together[row, 12 - len(prompt) :]
        assert torch.equal(ours[: len(alone)], alone) and (ours[len(alone) :] == 60).all()


@pytest.mark.parametrize(
    ("by", "draws"),
    [
        (0.3, 2500),
        pytest.param(0.1, 9000, marks=pytest.mark.long),
        pytest.param(1.0, 9000, marks=pytest.mark.long),
    ],
)
def test_the_distribution_is_the_models(by: float, draws: int) -> None:
    """Chi squared, over all pairs of two tokens after the first, of many draws at once."""
    model = make_model(vocab_size=5, n_layer=1, n_embd=16)
    draft = make_model(3, vocab_size=5, n_layer=1, n_embd=16)
    with torch.no_grad():
        for ours, theirs in zip(draft.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + by * torch.randn_like(theirs))
    how = Sampling(do_sample=True, temperature=1.5)
    out = model.generate(
        [[1, 4]] * draws,
        max_new_tokens=4,
        draft_model=draft,
        num_assistant_tokens=2,
        seed=torch.Generator().manual_seed(0),
        do_sample=True,
        temperature=how.temperature,
    )
    texts = torch.cartesian_prod(*[torch.arange(5)] * 3)  # all first three new tokens
    ids = torch.cat([torch.tensor([[1, 4]]).expand(125, 2), texts], dim=1)
    with torch.no_grad():
        logs = (model.double()(ids) / how.temperature).log_softmax(-1)[:, 1:4]
    expected = draws * logs.gather(-1, texts.unsqueeze(-1)).sum((1, 2)).exp()
    observed = (out[:, 2:5] @ torch.tensor([25, 5, 1])).bincount(minlength=125).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    observed = torch.cat([observed[~rare], observed[rare].sum().view(1)])
    statistic, freedom = ((observed - expected).square() / expected).sum(), len(expected) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # p < 1e-3


def test_one_sequence_streams() -> None:
    model = make_model()
    seen: list[int] = []
    got = model.generate(
        [[3, 4]],
        max_new_tokens=15,
        prompt_lookup_num_tokens=4,
        on_token=lambda tokens: seen.extend(tokens.tolist()),
    )
    assert got[0, 2:].tolist() == seen


def test_a_draft_of_nan() -> None:
    model, draft = make_model(), make_model(1)
    with torch.no_grad():
        draft.norm_f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the logits of draft_model are NaN"):
        model.generate([[1, 2]], max_new_tokens=4, draft_model=draft)
    with pytest.raises(ValueError, match="the logits of prompt 0 are NaN or infinite by new tok"):
        draft.generate([[1, 2]], max_new_tokens=4, draft_model=model)
