"""Contrastive search against its formula in float64, on the whole text at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.small import make_model, make_prompts

from fastattn import GPT

PROMPTS = make_prompts([5, 11, 1])


@torch.no_grad()
def _reference(model: GPT, prompt: list[int], alpha: float, top_k: int, steps: int) -> list[int]:
    """Equation 5 of Su et al. 2022, each candidate's whole text read on its own."""
    text = list(prompt)
    for _ in range(steps):
        hidden = model.features(torch.tensor([text]))[0]
        best = model.lm_head(hidden[-1]).softmax(-1).topk(top_k)
        scores = []
        for p, token in zip(best.values, best.indices.tolist(), strict=True):
            h = model.features(torch.tensor([[*text, token]]))[0, -1:]
            scores.append((1 - alpha) * p - alpha * torch.cosine_similarity(h, hidden).max())
        text.append(int(best.indices[torch.stack(scores).argmax()]))
    return text[len(prompt) :]


@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (0.25, 7), (1.0, 3)])
def test_equals_the_formula(alpha: float, top_k: int) -> None:
    """Of unequal prompts together, as float32."""
    model, prompts = make_model(), PROMPTS
    got = model.generate(prompts, max_new_tokens=12, penalty_alpha=alpha, top_k=top_k)
    exact = make_model().double()
    for row, prompt in zip(got[:, 11:].tolist(), prompts, strict=True):
        assert row == _reference(exact, prompt, alpha, top_k, 12)
    assert not torch.equal(got, model.generate(prompts, max_new_tokens=12))


def test_ends_streams_and_processors() -> None:
    model, prompts = make_model(), PROMPTS
    how: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4, "repetition_penalty": 1.3}
    free = model.generate(prompts, max_new_tokens=14, **how)
    ends = [int(free[0, 14]), int(free[1, 18])]
    seen: list[torch.Tensor] = []
    settings = {"eos_token_id": ends, "pad_token_id": 60, **how}
    got = model.generate(prompts, max_new_tokens=14, on_token=seen.append, **settings)
    assert torch.equal(torch.stack(seen, 1), got[:, 11:])
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], max_new_tokens=14, **settings)[0]
        ours = got[row, 11 - len(prompt) :]
        assert torch.equal(ours[: len(alone)], alone) and (ours[len(alone) :] == 60).all()


def test_fills_the_context() -> None:
    out = make_model(n_positions=48).generate(
        [[1] * 40], max_new_tokens=8, penalty_alpha=0.6, top_k=4
    )
    assert out.shape == (1, 48)
