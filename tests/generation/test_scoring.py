"""Log-probabilities of given tokens against those of each row alone, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation.small import make_model

import fastattn
from fastattn.generation import scoring
from fastattn.generation.scoring import Row, score

VOCABULARY, POSITIONS = 61, 24


def make(**settings: Any) -> fastattn.GPT:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return make_model(vocab_size=VOCABULARY, n_positions=POSITIONS, **ends, **settings)


LLAMA = {"positions": "rotary", "norm": "rms_norm", "n_kv_head": 2}


def draw(*lengths: int) -> list[list[int]]:
    return [torch.randint(VOCABULARY, (n,)).tolist() for n in lengths]


def shared_rows() -> list[Row]:
    """Three contexts with several answers each, some that differ in the last token, and others."""
    contexts = draw(9, 12, 1)
    rows = [Row(context, answer) for context in contexts for answer in draw(1, 1, 4, 2)]
    rows += [Row(context, answer) for context, answer in zip(draw(3, 20), draw(7, 5))]
    return [rows[i] for i in torch.randperm(len(rows)).tolist()]


@pytest.mark.parametrize("settings", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_rows_have_the_scores_that_they_have_alone(
    settings: dict[str, Any], batch_size: int
) -> None:
    model, rows = make(**settings), shared_rows()
    found = score(model, rows, batch_size=batch_size)
    model = model.double()
    for (context, tokens), scores in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *tokens[:-1]]]))[0, len(context) - 1 :]
        exact = logits.log_softmax(-1)
        expected = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(scores.log_probabilities, expected, rtol=1e-5, atol=2e-6)
        assert scores.greedy.tolist() == (exact.argmax(-1) == torch.tensor(tokens)).tolist()


def test_a_shared_context_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (context,) = make(), draw(15)
    read, features = [], model.features

    def counted(ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        read.append(ids.numel())
        return features(ids, cache)

    monkeypatch.setattr(model, "features", counted)
    score(model, [Row(context, answer) for answer in draw(2, 2, 2, 2)])
    assert read == [14, 4 * 2]


def test_logits_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make(), shared_rows()
    whole = score(model, rows)
    monkeypatch.setattr(scoring, "HEAD_ROWS", 3)
    for some, all_at_once in zip(score(model, rows), whole, strict=True):
        torch.testing.assert_close(some, all_at_once, rtol=1e-5, atol=1e-6)


def test_no_rows_have_no_scores() -> None:
    assert score(make(), []) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([], [1]), "row 0 has 0 and 1"),
        (Row([1], []), "row 0 has 1 and 0"),
        (Row([1] * POSITIONS, [1, 1]), f"n_positions = {POSITIONS}; row 0 has {POSITIONS + 1}"),
    ],
)
def test_rows_that_cannot_be_scored(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(make(), [row])


def test_a_masked_language_model_is_refused() -> None:
    """It has logits, and they would mean something else."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(TypeError, match=r"must be a causal language model.*BertForMaskedLM"):
        score(transformers.BertForMaskedLM(config), [Row([1], [2])])
