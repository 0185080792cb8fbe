"""Membership inference: can one tell from a model which texts it was trained on?

An attack gives each text a score, higher for members; its ROC curve over texts of both kinds says
how well it works. A model that betrays nobody has the area 0.5, up to the interval of chance.

    loss        the mean log-probability of the text's tokens (Yeom et al. 2018, arXiv:1709.01604)
    min_k       the mean of the least probable fifth of them (Shi et al. 2024, arXiv:2310.16789)
    reference   loss beside that of a model that has not read the texts: the log-probability of the
                text less that model's, for each byte (Carlini et al. 2021, arXiv:2012.07805)

Stronger attacks train many models (LiRA, Carlini et al. 2022, arXiv:2112.03570): an attack that
fails here is no proof of privacy, which only epsilon bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import numpy.typing
import torch

from fastattn.generation.scoring import score
from fastattn.nn.checks import check_integer
from fastattn.training.evaluation.perplexity import context_of, windows
from fastattn.training.tokenizer import Tokenizer

MIN_K = 0.2
FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Leakage:
    """How well an attack tells members from others, each figure with its 95% interval.

    Attributes:
        auc: the area under the ROC curve: the probability that a member's score is the higher one
            of a pair, equal ones counting half.
        true_positives: the share of the members that are found where at most `FALSE_POSITIVES` of
            the others are taken for members.
        auc_interval, true_positives_interval: low and high, by bootstrap over texts.
    """

    auc: float
    auc_interval: tuple[float, float]
    true_positives: float
    true_positives_interval: tuple[float, float]


def leakage(
    members: numpy.typing.ArrayLike,
    others: numpy.typing.ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Leakage:
    """The figures of an attack from its scores.

    Args:
        members, others: (n,) and (m,) scores, at least two each; higher means "member".
        resamples: of the bootstrap: texts of both kinds drawn again with replacement.

    Raises:
        ValueError: too few scores, or one that is no number.
    """
    given = [numpy.asarray(scores, dtype=float) for scores in (members, others)]
    for name, scores in zip(("members", "others"), given):
        if scores.ndim != 1 or len(scores) < 2 or numpy.isnan(scores).any():
            raise ValueError(f"{name} must be at least two numbers in a list, got {scores}")
    check_integer("resamples", resamples, at_least=1)
    random = numpy.random.default_rng(seed)
    figures = numpy.array(
        [
            _figures(*(random.choice(scores, len(scores)) for scores in given))
            for _ in range(resamples)
        ]
    )
    low, high = numpy.quantile(figures, (0.025, 0.975), axis=0)
    auc, found = _figures(*given)
    return Leakage(auc, (float(low[0]), float(high[0])), found, (float(low[1]), float(high[1])))


def _figures(members: numpy.ndarray, others: numpy.ndarray) -> tuple[float, float]:
    """Area and true positives."""
    ordered = numpy.sort(others)
    lower = ordered.searchsorted(members, "left") + ordered.searchsorted(members, "right")
    allowed = math.floor(FALSE_POSITIVES * len(ordered))
    threshold = ordered[-1 - allowed]
    return float(lower.mean() / (2 * len(ordered))), float((members > threshold).mean())


def attacks(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    members: Sequence[str],
    others: Sequence[str],
    *,
    reference: tuple[torch.nn.Module, Tokenizer] | None = None,
    context: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, Leakage]:
    """Each attack's figures on a causal language model.

    Args:
        members: texts that it was trained on, whole as they were.
        others: texts of the same kind that it was not trained on: where they differ in length or
            style from the members, that is found, and not the membership.
        reference: another model with its tokenizer, for the attack of that name.
        context: tokens that the models read at once; by default all their positions.
        on_progress: called after each batch with the windows that it had.

    Raises:
        TypeError, ValueError: a text is empty, there are fewer than two of a kind, or an argument
            does not fit.
    """
    texts = [*members, *others]
    count = len(members)

    how: Any = {"context": context, "batch_size": batch_size, "on_progress": on_progress}
    found = log_probabilities(model, tokenizer, texts, **how)
    scores = {
        "loss": [values.mean().item() for values in found],
        "min_k": [_least(values) for values in found],
    }
    if reference is not None:
        without = log_probabilities(*reference, texts, **how)
        scores["reference"] = [
            (values.sum() - other.sum()).item() / len(text.encode())
            for values, other, text in zip(found, without, texts)
        ]
    return {name: leakage(each[:count], each[count:]) for name, each in scores.items()}


def log_probabilities(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], object] | None = None,
) -> list[torch.Tensor]:
    """Of each text the log-probabilities (n,), float64, in nats, of its tokens after the first, and
    of the end of text: as the objective `causal` has trained them, so that whatever was learned by
    heart comes up.

    Arguments and errors are those of `evaluation.perplexity`, with windows of half the context.
    """
    encoded = tokenizer.encode_many(texts)
    if not all(encoded):
        raise ValueError(f"text {[*map(bool, encoded)].index(False)} has no token: leave it out")
    length, end = context_of(model, context), tokenizer.end_of_text
    rows = [[*windows([*ids, end], length, max(1, length // 2))] for ids in encoded]
    flat = [row for each in rows for row in each]
    scores = iter(score(model, flat, batch_size=batch_size, on_progress=on_progress))
    return [torch.cat([next(scores).log_probabilities for _ in each]) for each in rows]


def _least(values: torch.Tensor) -> float:
    """The mean of the least probable tokens, at least one."""
    return values.sort().values[: math.ceil(MIN_K * len(values))].mean().item()
