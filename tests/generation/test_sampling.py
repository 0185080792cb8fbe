"""Each step from logits to tokens against transformers' processor of the same name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastattn.generation.sampling import Sampling, draw, penalise, uniforms, warp


def _theirs(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    return processors


@pytest.mark.parametrize("temperature", [1.0, 0.3, 7])
@pytest.mark.parametrize("top_k", [None, 1, 10, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.95, 1.0])
def test_warp_equals_transformers(
    temperature: float, top_k: int | None, top_p: float | None, device: str
) -> None:
    logits = 3 * torch.randn(5, 200, device=device)
    ours = warp(logits, Sampling(True, temperature, top_k, top_p))
    theirs = _theirs(temperature, top_k, top_p)(torch.zeros(5, 1).long(), logits.clone())
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours, theirs)


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    ours = warp(logits, Sampling(True, top_k=2, top_p=0.99))
    assert torch.equal(ours, _theirs(1.0, 2, 0.99)(torch.zeros(2, 1).long(), logits))
    assert ours.isfinite().sum(-1).tolist() == [4, 2]


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_penalise_equals_transformers(penalty: float) -> None:
    logits, tokens = torch.randn(3, 50), torch.randint(0, 50, (3, 20))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, tokens, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    torch.testing.assert_close(penalise(logits, seen, penalty), theirs)


def test_draw_inverts_the_distribution_function() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    points = torch.tensor([0.0, 0.2, 0.25, 0.3, 0.7499, 0.75, 1 - 2.0**-50], dtype=torch.float64)
    tokens = draw(probabilities.log().expand(7, 6), points)
    assert tokens.tolist() == [1, 1, 3, 3, 3, 4, 4]


def test_draws_have_the_distribution() -> None:
    torch.manual_seed(1)
    logits, count = torch.randn(1, 20), 20_000
    logits[0, :3] = -math.inf
    numbers = uniforms(0, 1, count, torch.device("cpu"))[:, 0]
    observed = draw(logits.expand(count, -1), numbers).bincount(minlength=20)
    assert not observed[:3].any()
    expected = count * logits[0, 3:].softmax(-1)
    statistic = ((observed[3:] - expected).square() / expected).sum()
    assert statistic < 45  # chi squared with 16 degrees of freedom: p < 2e-4


def test_uniforms_of_a_row_are_its_own() -> None:
    cpu = torch.device("cpu")
    both = uniforms(7, 2, 5, cpu)
    assert both.shape == (5, 2) and both.dtype == torch.float64
    assert torch.equal(both[:, 1:], uniforms(8, 1, 5, cpu))
    assert torch.equal(both, uniforms([7, 8], 2, 5, cpu))
    assert torch.equal(both[:3], uniforms(7, 2, 3, cpu))
    assert not torch.equal(both[:, 0], both[:, 1])


def test_uniforms_from_generators() -> None:
    cpu = torch.device("cpu")
    first = uniforms(torch.Generator().manual_seed(3), 2, 5, cpu)
    assert torch.equal(first, uniforms(torch.Generator().manual_seed(3), 2, 5, cpu))
    torch.manual_seed(3)
    assert torch.equal(first, uniforms(None, 2, 5, cpu))
    assert not torch.equal(first, uniforms(None, 2, 5, cpu))


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (1.5, TypeError, "seed must be an integer, one for each.*got 1.5"),
        (True, TypeError, "seed must be an integer, one for each.*got True"),
        ([1, 2.0], TypeError, "seed must be an integer, one for each"),
        (2**64, ValueError, r"the seed of sequence 0 must be from -2\*\*63 .* modulo"),
        (2**64 - 1, ValueError, r"the seed of sequence 1 must be from .* got 18446744073709551616"),
        ([0, -(2**63) - 1], ValueError, "the seed of sequence 1 must be from"),
        ([1, 2, 3], ValueError, "seed must have one entry for each of 2 sequences, got 3"),
    ],
)
def test_bad_seed(seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        uniforms(seed, 2, 5, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be positive.*got 0; for greedy"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"top_k": -1}, ValueError, "top_k must be at least 1, or 0 or None for all, got -1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer or None, got 1.5"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], or None, got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], or None, got 1.1"),
        ({"top_p": "a"}, TypeError, "top_p must be a number, got 'a'"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be positive"),
        (
            {"repetition_penalty": math.inf},
            ValueError,
            "repetition_penalty must be positive and fi",
        ),
        (
            {"do_sample": False, "temperature": 0.5, "top_k": 3},
            ValueError,
            "temperature and top_k would have no effect",
        ),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sampling(**{"do_sample": True, **arguments})
