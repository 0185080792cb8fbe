"""generate on every family that generates: transformers' beams, and its generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models.families import encoder_decoder_cases
from models.families.cases import USUAL, theirs

import fastattn
from fastattn.generation import GenerationConfig

LENGTHS = [5, 12, 1]


def _sources(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of unequal lengths."""
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask.flip(1) if left else mask


@pytest.mark.parametrize("name", [*USUAL, "t5", "bart", "marian"])
def test_beams_and_speculation(name: str, tmp_path: Path) -> None:
    seq2seq = name not in USUAL
    original = encoder_decoder_cases.theirs(name) if seq2seq else theirs(name)
    original.save_pretrained(tmp_path)
    ours = fastattn.models.load(tmp_path)
    ids, mask = _sources(left=not seq2seq)
    every: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 96, "attention_mask": mask}
    new = ours.generate(ids, **every)[:, 1 if seq2seq else 12 :]
    every["eos_token_id"] = sorted({int(new[0, 4]), int(new[1, 8])})
    greedy = ours.generate(ids, **every)
    assert torch.equal(greedy, original.generate(ids, do_sample=False, num_beams=1, **every))
    beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}
    expected = original.generate(ids, do_sample=False, **beams, **every)
    assert torch.equal(ours.generate(ids, **beams, **every), expected)
    if not seq2seq:
        assert torch.equal(ours.generate(ids, draft_model=ours, **every), greedy)
        assert torch.equal(ours.generate(ids, prompt_lookup_num_tokens=4, **every), greedy)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_generation_config(name: str, tmp_path: Path) -> None:
    """Read with the model, applied where the caller is silent, and saved with it."""
    original = encoder_decoder_cases.theirs(name) if name == "bart" else theirs(name)
    settings = {"num_beams": 3, "max_new_tokens": 9, "no_repeat_ngram_size": 2, "eos_token_id": 5}
    for key, value in settings.items():
        setattr(original.generation_config, key, value)
    original.save_pretrained(tmp_path / "theirs")
    ours = fastattn.models.load(tmp_path / "theirs")
    assert ours.generation_config.num_beams == 3
    ids, mask = _sources(left=name == "llama")
    expected = original.generate(ids, attention_mask=mask, pad_token_id=96)
    assert torch.equal(ours.generate(ids, attention_mask=mask, pad_token_id=96), expected)
    ours.save_pretrained(tmp_path / "ours")
    saved = GenerationConfig.from_folder(tmp_path / "ours")
    assert {key: getattr(saved, key) for key in settings} == settings
    back = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert {key: getattr(back, key) for key in settings} == settings


def test_a_damaged_generation_config(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    for text, message in (
        ('{"num_beams": 0}', "num_beams must be at least 1"),
        ('{"eos_token_id": "a"}', "eos_token_id must be"),
        ("[1", "not valid JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
            fastattn.models.load(tmp_path)
    file.unlink()
    assert fastattn.models.load(tmp_path).generation_config is None
