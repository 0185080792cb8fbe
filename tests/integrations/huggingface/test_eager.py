"""Families that have no "sdpa": `accelerate` puts ours in the place of "eager"."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from integrations.huggingface.architectures import build, inputs

import fastattn
from fastattn.integrations.huggingface import NAME, dispatch
from fastattn.integrations.huggingface import attention as face

FAMILY = "gpt_oss"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call of our op."""
    calls: list[int] = []
    original = face.attention

    def spy(*tensors: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*tensors, **kwargs)

    monkeypatch.setattr(face, "attention", spy)
    return calls


def pair(family: str, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs = build(family, device)
    ours = copy.deepcopy(theirs)
    report = fastattn.accelerate(ours)
    assert any("Attention" in entry.class_name for entry in report.swapped), report
    return ours, theirs


def test_weights_are_the_originals(device: str, used: list[int]) -> None:
    ours, theirs = pair(FAMILY, device)
    given, _ = inputs(FAMILY, device)
    used.clear()
    ours(**given)
    assert len(used) == 2
    used.clear()
    found, expected = (m(**given, output_attentions=True).attentions for m in (ours, theirs))
    assert not used and len(found) == len(expected) == 2
    torch.testing.assert_close(found, expected)
    # Told by the config.
    for model in (ours, theirs):
        model.config.output_attentions = True
    found, expected = (m(**given).attentions for m in (ours, theirs))
    assert not used and len(found) == len(expected) == 2


@pytest.mark.long  # two compilations of a model; test_hypotheses and test_inner have small ones
def test_compiled(device: str, used: list[int]) -> None:
    ours, theirs = pair(FAMILY, device)
    given, defined = inputs(FAMILY, device)
    used.clear()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found = compiled(**given, use_cache=False).logits[defined]
    expected = theirs(**given, use_cache=False).logits[defined]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours(**given, output_attentions=True)  # transformers' hooks are installed under a lock
    weights = compiled(**given, use_cache=False, output_attentions=True).attentions
    assert len(weights) == 2


def test_another_implementation_runs_the_original(device: str, used: list[int]) -> None:
    ours, theirs = pair(FAMILY, device)
    given, defined = inputs(FAMILY, device)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        used.clear()
        found = other(**given).logits[defined]
        assert len(used) == 2
        torch.testing.assert_close(found, theirs(**given).logits[defined], rtol=1e-4, atol=1e-4)
    ours.set_attn_implementation(NAME)
    left = {e.class_name: e.reason for e in fastattn.verify(ours).left}
    assert f'already says attn_implementation="{NAME}"' in str(left["GptOssAttention"])


def test_a_family_that_declares_nothing_is_left_alone(device: str) -> None:
    """Its layers may count on the weights, which every other implementation leaves out."""
    model = build("splinter", device)
    assert dispatch.replaceable(model.config) is None
    left = {e.class_name: e.reason for e in fastattn.accelerate(model).left}
    assert "may count on its weights" in str(left["SplinterSelfAttention"])
