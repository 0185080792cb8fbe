"""The distillation's loss and gradients against its definition in float64, and its teachers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers

import fastattn
from fastattn.training import Tokenizer
from fastattn.training.contract import Batch, Interface
from fastattn.training.objectives import Distillation
from fastattn.training.objectives.distillation import DistillationSettings

TEXTS = ["the quick brown fox", "我喜欢编程", "a", "jumps over dogs and jumps again"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def _gpt(tokenizer: Tokenizer, seed: int, **changes: Any) -> fastattn.GPT:
    torch.manual_seed(seed)
    config = {
        "vocab_size": tokenizer.vocab_size, "n_positions": 64, "n_embd": 24, "n_layer": 1,
        "n_head": 2, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return fastattn.GPT(fastattn.GPTConfig(**(config | changes)))


@pytest.fixture(scope="module")
def teacher(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder. Dropout is there to show that the teacher is in eval mode."""
    folder = tmp_path_factory.mktemp("teacher")
    _gpt(tokenizer, 1, n_layer=2, resid_pdrop=0.5).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def _batch(objective: Distillation) -> Batch:
    examples = [example for text in TEXTS for example in objective.encode({"text": text})]
    return objective.collate(examples, numpy.random.default_rng(0))


def _defined(
    tokenizer: Tokenizer, teacher: Any, student: Any, temperature: float, alpha: float
) -> torch.Tensor:
    """The formula, a document and a place at a time, in float64."""
    terms = []
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.end_of_text]
        row = torch.tensor([ids])
        outputs = [model(row) for model in (teacher, student)]
        theirs, ours = (getattr(output, "logits", output)[0] for output in outputs)
        for place, following in enumerate(ids[1:]):
            p, q = (torch.softmax(x[place] / temperature, -1) for x in (theirs, ours))
            divergence = (p * (p / q).log()).sum()
            own = -torch.softmax(ours[place], -1)[following].log()
            terms.append(alpha * temperature**2 * divergence + (1 - alpha) * own)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("interface", ["fastattn", "transformers"])
@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 0.5), (0.7, 1.0), (4.0, 0.0)])
def test_it_is_the_definition(
    tokenizer: Tokenizer, teacher: Path, interface: Interface, temperature: float, alpha: float
) -> None:
    settings = DistillationSettings(teacher=str(teacher), temperature=temperature, alpha=alpha)
    objective = Distillation(tokenizer, settings, interface)
    student: Any = _gpt(tokenizer, 2)
    if interface == "transformers":
        config = transformers.GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=24, n_layer=1, n_head=2,
            initializer_range=0.4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        student = transformers.GPT2LMHeadModel(config)
    loss = objective.loss(student.train(), _batch(objective))
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    exact = fastattn.GPT.from_pretrained(teacher).double().eval().requires_grad_(False)
    wide = copy.deepcopy(student).double()
    wide.zero_grad()
    expected = _defined(tokenizer, exact, wide, temperature, alpha)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in wide.named_parameters():
        error = (got[name] - parameter.grad).abs().max()
        assert error <= 1e-5 * parameter.grad.abs().max() + 1e-7, name
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())


def test_the_teacher_itself_has_nothing_to_learn(tokenizer: Tokenizer, teacher: Path) -> None:
    objective = Distillation(tokenizer, DistillationSettings(teacher=str(teacher), alpha=1.0))
    student = fastattn.GPT.from_pretrained(teacher).eval()
    assert abs(objective.loss(student, _batch(objective)).item()) < 1e-6


def test_what_is_measured(tokenizer: Tokenizer, teacher: Path) -> None:
    settings = DistillationSettings(teacher=str(teacher), temperature=3.0, alpha=0.3)
    objective, student = Distillation(tokenizer, settings), _gpt(tokenizer, 2).eval()
    with torch.no_grad():
        measured = objective.measure(student, [_batch(objective)])
        assert objective.observe(student, _batch(objective))[1] == _batch(objective).counted
        exact = [model.double() for model in (objective.teacher, student)]
        whole, own, divergence = (
            _defined(tokenizer, *exact, 3.0, alpha).item() for alpha in (0.3, 0.0, 1.0)
        )
    expected = {"loss": whole, "divergence": divergence, "cross_entropy": own}
    assert measured == pytest.approx(expected | {"perplexity": math.exp(own)}, rel=1e-4)
    two = objective.conclude([([1.0, 3.0], 3), ([5.0, 1.0], 1)])  # 3 targets and 1
    assert (two["divergence"], two["cross_entropy"]) == (2.0, 2.5)


def test_other_vocabularies(tokenizer: Tokenizer, teacher: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["something else, which merges otherwise"], 300)
    settings = DistillationSettings(teacher=str(teacher))
    with pytest.raises(ValueError, match=r"another vocabulary, of \d+ tokens, than the student"):
        Distillation(other, settings)
    objective = Distillation(tokenizer, settings)
    student = _gpt(tokenizer, 0, vocab_size=tokenizer.vocab_size + 5)
    with pytest.raises(ValueError, match="give the student's config the same vocab_size"):
        objective.loss(student, _batch(objective))
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        Distillation(tokenizer, DistillationSettings(teacher=str(tmp_path)))
