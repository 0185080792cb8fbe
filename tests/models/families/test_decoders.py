"""Decoders of every family against transformers', both ways by way of a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models.families import table
from models.families.cases import CASES, USUAL, theirs

import fastattn
from fastattn import GPT
from fastattn.models.families import FAMILIES
from fastattn.models.folder.layout import layout
from oracle import assert_close_to_reference


def _tokens(batch: int = 2, seqlen: int = 33) -> torch.Tensor:
    return torch.randint(3, 97, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def _read(model: Any, folder: Path) -> GPT:
    model.save_pretrained(folder)
    ours = fastattn.models.load(folder)
    assert type(ours) is GPT and not ours.training
    return ours


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    """transformers' folder gives its logits here, and ours gives the same model there."""
    original = theirs(name)
    ours = _read(original, tmp_path / "theirs")
    tokens = _tokens()
    with torch.no_grad():
        expected = original(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)
    assert ours.family == CASES[name][0]
    ours.save_pretrained(tmp_path / "ours", max_shard_size=100_000)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(back) is type(original) and not any(info.values()), info
    first, second = original.state_dict(), back.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    given, got = original.config.to_dict(), back.config.to_dict()
    for key in ("_name_or_path", "attn_implementation"):
        given.pop(key, None), got.pop(key, None)
    assert got == given


def _gradients(model: torch.nn.Module, logits: torch.Tensor, targets: torch.Tensor) -> Any:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in USUAL), ("gpt2", torch.float32)]
)
def test_logits_and_gradients_hold_the_rule(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against transformers' eager attention and its float64."""
    eager = theirs(name, initializer_range=0.1, attn_implementation="eager").to(dtype)
    ours = _read(eager, tmp_path)
    exact = copy.deepcopy(eager).double()
    tokens, targets = _tokens(), _tokens().flip(0)
    targets[:, ::5] = -100
    logits, loss = ours(tokens, targets)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    results = (eager(tokens).logits, exact(tokens).logits)
    assert_close_to_reference(logits, *results, name="logits")
    loss.backward()
    mine = {key: p.grad for key, p in ours.named_parameters()}
    measure, reference = (
        _gradients(model, of, targets) for model, of in zip((eager, exact), results, strict=True)
    )
    for how in layout(ours, FAMILIES[CASES[name][0]]):
        stored = torch.cat([mine[one] for one in how.ours])
        parts = stored.split(how.rows) if len(how.names) > 1 else [stored]
        for part, key in zip(parts, how.names, strict=True):
            part = part.t() if how.transposed else part
            assert_close_to_reference(part, measure[key], reference[key], name=key)


@pytest.mark.parametrize("name", USUAL)
def test_greedy_tokens_are_transformers(name: str, tmp_path: Path) -> None:
    """With the cache and without, alone and with prompts of other lengths."""
    original = theirs(name, eos_token_id=None)
    ours = _read(original, tmp_path)
    prompts = [_tokens(1, n)[0].tolist() for n in (13, 4, 9)]
    got = ours.generate(prompts, max_new_tokens=20)
    for row, prompt in enumerate(prompts):
        one = torch.tensor([prompt])
        expected = original.generate(one, max_new_tokens=20, do_sample=False)[0, len(prompt) :]
        assert torch.equal(got[row, -20:], expected)
        tokens = one
        with torch.no_grad():
            for _ in range(20):
                tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], 1)
        assert torch.equal(tokens[0, len(prompt) :], expected)


def test_the_page_has_a_row_of_every_family() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    for kind, family in FAMILIES.items():
        row = f"| {family.title} | `{kind}` |"
        assert row in page, "python tests/models/families/table.py --write"
