"""generation_config.json: read as transformers writes it, applied where the caller is silent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generation.small import make_model

from fastattn import GPT
from fastattn.generation import GenerationConfig


def test_reads_and_writes_as_transformers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 9,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "eos_token_id": [3, 4],
        "bos_token_id": 1,
        "pad_token_id": 0,
        "bad_words_ids": [[5, 6]],
    }
    transformers.GenerationConfig(**settings).save_pretrained(tmp_path)
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig(**settings)
    GenerationConfig(**settings, unsupported=(("typical_p", 0.9),)).save(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(theirs, name) for name in settings} == settings
    assert GenerationConfig.from_folder(tmp_path).unsupported == (("typical_p", 0.9),)
    with pytest.raises(ValueError, match="logits_processor is code"):
        GenerationConfig(logits_processor=lambda ids, logits: logits).save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig()


PROMPTS = [[1, 2, 3], [4]]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": [3, 9]},
        {"no_repeat_ngram_size": 2, "forced_eos_token_id": 7, "min_new_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
    ids=str,
)
def test_applies_where_the_caller_is_silent(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = make_model()
    every: dict[str, Any] = {"max_new_tokens": 12, **settings}
    seed = {"seed": 3} if settings.get("do_sample") else {}
    expected = model.generate(PROMPTS, **every, **seed)
    (tmp_path / "generation_config.json").write_text(json.dumps(every))
    config = GenerationConfig.from_folder(tmp_path)
    assert torch.equal(model.generate(PROMPTS, generation_config=config, **seed), expected)
    model.generation_config = config
    assert torch.equal(model.generate(PROMPTS, **seed), expected)
    # The caller goes first.
    greedy = {"do_sample": False, "num_beams": 1, "penalty_alpha": 0.0, "eos_token_id": ()}
    greedy |= {"no_repeat_ngram_size": 0, "forced_eos_token_id": (), "min_new_tokens": 0}
    got = model.generate(PROMPTS, max_new_tokens=5, **greedy)
    del model.generation_config
    assert torch.equal(got, model.generate(PROMPTS, max_new_tokens=5))


def test_the_callers_config_goes_before_the_models() -> None:
    model = make_model()
    model.generation_config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.5)
    got = model.generate(PROMPTS, generation_config=GenerationConfig(max_new_tokens=4))
    assert torch.equal(got, model.generate(PROMPTS, max_new_tokens=4, repetition_penalty=1.5))
    assert model.generate(PROMPTS, max_length=8).shape == (2, 8)


def test_a_configs_least_length_may_be_more_than_the_call_allows() -> None:
    model = make_model()
    model.generation_config = GenerationConfig(min_length=40, eos_token_id=list(range(30)))
    got = model.generate(PROMPTS, max_new_tokens=5)
    assert (got[:, 3:] >= 30).all()
    with pytest.raises(ValueError, match="min_length must be at most what max_new_tokens = 5"):
        model.generate(PROMPTS, max_new_tokens=5, min_length=9)


def test_special_tokens_of_the_config() -> None:
    model = make_model()
    free = model.generate([[1, 2, 3]], max_new_tokens=8)[0, 3:].tolist()
    model.generation_config = GenerationConfig(
        max_new_tokens=8, eos_token_id=[free[2], 99], pad_token_id=60
    )
    got = model.generate([[1, 2, 3], [4]])
    assert got[0, 3 : 4 + free.index(free[2])].tolist() == free[: 1 + free.index(free[2])]
    assert got[1, :2].tolist() == [60, 60]
    assert model.generate([[1, 2, 3]], eos_token_id=()).shape == (1, 11)


def test_what_generate_does_not_have_is_refused(tmp_path: Path) -> None:
    model = make_model()
    data = {"max_new_tokens": 4, "guidance_scale": 1.5, "typical_p": 0.9, "use_cache": True}
    data |= {"epsilon_cutoff": 0.0, "renormalize_logits": False, "chat_format": "chatml"}
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    model.generation_config = GenerationConfig.from_folder(tmp_path)
    assert dict(model.generation_config.unsupported) == {"guidance_scale": 1.5, "typical_p": 0.9}
    with pytest.raises(ValueError, match=r"asks for guidance_scale=1.5, which generate does not"):
        model.generate([[1]])
    with pytest.raises(ValueError, match=r"guidance_scale=1.5, typical_p=0.9"):
        model.generate([[1]], do_sample=True)
    model.generation_config = dataclasses.replace(model.generation_config, unsupported=())
    assert model.generate([[1]]).shape == (1, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "generation_config.json: not valid JSON"),
        ("[]", "must hold a JSON object, got a list"),
        ('{"num_beams": 0}', "num_beams must be at least 1, got 0"),
        ('{"do_sample": true, "temperature": -1}', "temperature must be positive and finite"),
        ('{"max_new_tokens": "a"}', "max_new_tokens must be an integer, got 'a'"),
        ('{"early_stopping": "maybe"}', 'early_stopping must be True, False or "never"'),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        GenerationConfig.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="path must be a folder"):
        GenerationConfig.from_folder(tmp_path / "none")


class _Streamer:
    def __init__(self) -> None:
        self.put_: list[torch.Tensor] = []
        self.ended = False

    def put(self, tokens: torch.Tensor) -> None:
        self.put_.append(tokens)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("how", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_streams_as_transformers_does(tmp_path: Path, how: dict[str, Any]) -> None:
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_positions=48, n_embd=32, n_layer=2, n_head=4, eos_token_id=None
        )
    )
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    ours, expected = _Streamer(), _Streamer()
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids, max_new_tokens=5, streamer=ours, **how)
    mask = torch.ones_like(ids)
    theirs.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, streamer=expected)
    assert ours.ended and expected.ended
    assert [t.tolist() for t in ours.put_] == [t.tolist() for t in expected.put_]
    assert torch.equal(torch.cat([t.flatten() for t in ours.put_]), out[0])


def test_several_samples_of_a_prompt() -> None:
    model = make_model()
    how = {"max_new_tokens": 6, "do_sample": True}
    got = model.generate(PROMPTS, num_return_sequences=3, seed=5, **how)
    repeated = [p for p in PROMPTS for _ in range(3)]
    assert torch.equal(got, model.generate(repeated, seed=5, **how))
    assert len({tuple(row) for row in got.tolist()}) > 2
