"""Membership inference: areas and shares by their definitions; a model that has learned by heart."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from training.privacy import private as p

from fastattn.cli import main
from fastattn.training import Causal
from fastattn.training.privacy.membership import attacks, leakage, log_probabilities


@pytest.mark.parametrize("sizes", [(2, 2), (7, 30), (150, 250)])
def test_area_and_true_positives_by_their_definitions(sizes: tuple[int, int]) -> None:
    """All pairs counted; each threshold tried. Scores of few values have ties."""
    random = numpy.random.default_rng(sum(sizes))
    members, others = (random.integers(0, 40, size) / 7 for size in sizes)
    pairs = [(m > o) + (m == o) / 2 for m, o in itertools.product(members, others)]
    best = max(
        float((members > threshold).mean())
        for threshold in [*others, math.inf]
        if (others > threshold).mean() <= 0.01
    )
    found = leakage(members, others, resamples=20)
    assert found.auc == pytest.approx(numpy.mean(pairs))
    assert found.true_positives == best


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Members one deviation higher: the area is Phi(1 / sqrt(2)) = 0.760."""
    truth = 0.5 * (1 + math.erf(0.5))
    held = 0
    for seed in range(60):
        random = numpy.random.default_rng(seed)
        found = leakage(random.normal(1, 1, 60), random.normal(0, 1, 80), resamples=200, seed=seed)
        low, high = found.auc_interval
        assert low <= found.auc <= high
        assert 0 <= found.true_positives_interval[0] <= found.true_positives_interval[1] <= 1
        held += low <= truth <= high
    assert held >= 50  # 95% of 60 is 57


def test_log_probabilities_are_those_of_training() -> None:
    """Of a text that the context holds, the loss of its row; of a longer one each token once."""
    model = p.model().eval()
    texts = ["abc", "x", "文", "a longer text than the context of twenty-four bytes"]
    found = log_probabilities(model, p.TOKENIZER, texts, batch_size=3)
    objective = Causal(p.TOKENIZER)
    for text, values in zip(texts, found):
        assert len(values) == len(text.encode())
        if len(values) < 24:
            (example,) = objective.encode({"text": text})
            batch = objective.collate([example], numpy.random.default_rng(0))
            assert -values.mean().item() == pytest.approx(objective.loss(model, batch).item(), 1e-5)
    with pytest.raises(ValueError, match="text 1 has no token"):
        log_probabilities(model, p.TOKENIZER, ["a", ""])


def drawn(count: int, seed: int) -> list[str]:
    random = numpy.random.default_rng(seed)
    return ["".join(random.choice(list("abcdefghij"), 16)) for _ in range(count)]


def test_a_model_that_knows_texts_by_heart_is_found() -> None:
    """And one that has not read them is not, with the same texts."""
    members, others = drawn(24, 0), drawn(40, 1)
    fresh, model = p.model(), p.model()
    rows = torch.tensor([[*p.TOKENIZER.encode(text), p.TOKENIZER.end_of_text] for text in members])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = (fresh, p.TOKENIZER)
    found = attacks(model, p.TOKENIZER, members, others, reference=reference)
    assert set(found) == {"loss", "min_k", "reference"}
    for figures in found.values():
        assert figures.auc_interval[0] > 0.9 and figures.true_positives > 0.5
    for name, figures in attacks(fresh, p.TOKENIZER, members, others).items():
        assert figures.auc_interval[0] < 0.5 < figures.auc_interval[1], name


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p.model().save_pretrained(tmp_path / "model")
    p.TOKENIZER.save(tmp_path / "model")
    for name, texts in (("members", drawn(6, 0)), ("others", drawn(8, 1))):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    command = ["evaluate", f"{tmp_path}/model", "--documents", "line", "--json"]
    data = ["--data", f"{tmp_path}/others.txt", "--members", f"{tmp_path}/members.txt"]
    assert main([*command, *data, "--reference", f"{tmp_path}/model"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["reference_auc"] == 0.5  # all scores are 0
    assert scores["loss_auc_low"] <= scores["loss_auc"] <= scores["loss_auc_high"]
    for extra, message in (
        (["--data", f"{tmp_path}/others.txt", "--reference", "x"], "--reference needs --members"),
        ([*data, "--stride", "2"], "--stride and --members"),
    ):
        assert main([*command, *extra]) == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("scores", [[1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_scores_that_are_none(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="members must be at least two numbers"):
        leakage(scores, [1.0, 2.0])
