"""What makes a model, and what does not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fastattn import GPT, GPTConfig
from fastattn.models.families.gpt2 import FIELDS


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As published, counted with the tied head once.
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_preset_has_the_published_size(name: str, parameters: int) -> None:
    model = GPT(GPTConfig.preset(name), device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_preset_takes_changes() -> None:
    config = GPTConfig.preset("gpt2-medium", n_layer=2, resid_pdrop=0.1)
    assert (config.n_embd, config.n_layer, config.resid_pdrop) == (1024, 2, 0.1)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"name must be one of 'gpt2', .*got 'gpt3'"):
        GPTConfig.preset("gpt3")


def test_defaults_are_gpt2s_but_for_dropout() -> None:
    theirs = transformers.GPT2Config().to_dict()
    dropouts = {"embd_pdrop", "attn_pdrop", "resid_pdrop"}
    for name in FIELDS:
        if name not in dropouts:
            assert getattr(GPTConfig(), name) == theirs[name], name


def test_config_is_hashable_and_takes_several_ends() -> None:
    assert hash(GPTConfig(eos_token_id=[1, 2])) == hash(GPTConfig(eos_token_id=(1, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"n_layer": 1.5}, TypeError, "n_layer must be an integer, got 1.5"),
        ({"n_layer": True}, TypeError, "n_layer must be an integer, got True"),
        ({"n_inner": -4}, ValueError, "n_inner must be at least 1, got -4"),
        ({"n_inner": "4"}, TypeError, "n_inner must be an integer or None, got '4'"),
        ({"n_head": 5}, ValueError, "n_head must divide n_embd, got n_head=5 and n_embd=48"),
        ({"activation_function": "mish"}, ValueError, "activation_function must be .*got 'mish'"),
        ({"resid_pdrop": 1.0}, ValueError, r"resid_pdrop must be in \[0, 1\), got 1.0"),
        ({"attn_pdrop": "0.1"}, TypeError, "attn_pdrop must be a number, got '0.1'"),
        ({"layer_norm_epsilon": 0}, ValueError, "layer_norm_epsilon must be positive, got 0"),
        ({"initializer_range": float("nan")}, ValueError, "initializer_range must be positive"),
        ({"bos_token_id": "a"}, TypeError, "bos_token_id must be an integer or None, got 'a'"),
        ({"eos_token_id": 0.5}, TypeError, "eos_token_id must be an integer, several or None"),
        ({"eos_token_id": (1, None)}, TypeError, "each eos_token_id must be an integer, got None"),
        (
            {"activation_function": ["gelu"]},
            ValueError,
            "activation_function must be .*got .'gelu'",
        ),
        ({"attn_pdrop": None}, TypeError, "attn_pdrop must be a number, got None"),
        ({"eos_token_id": {1, 2}}, TypeError, "eos_token_id must be an integer, several or None"),
        ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings must be True or False, got 1"),
    ],
)
def test_bad_field(
    small: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GPTConfig(**{**small, **changes})


def test_numbers_of_numpy_become_python_numbers(small: dict[str, Any]) -> None:
    changes = {"n_embd": np.int64(48), "layer_norm_epsilon": np.float32(0.5), "resid_pdrop": 0}
    config = GPTConfig(**{**small, **changes})
    assert type(config.n_embd) is int and type(config.layer_norm_epsilon) is float
    assert json.loads(json.dumps(dataclasses.asdict(config)))["layer_norm_epsilon"] == 0.5


def test_softmax_scale(small: dict[str, Any]) -> None:
    plain = GPTConfig(**small)
    assert plain.softmax_scale(2) == pytest.approx(12**-0.5)
    scaled = GPTConfig(**small, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False)
    assert [scaled.softmax_scale(layer) for layer in range(3)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_new_weights_are_gpt2s(small: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**small, "n_embd": 128, "initializer_range": 0.02}))
    expected = {"wte": 0.02, "wpe": 0.02, "in_proj": 0.02, "linear1": 0.02}
    expected |= {"out_proj": 0.02 / 6**0.5, "linear2": 0.02 / 6**0.5}  # 2 branches in 3 layers
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = next(std for part, std in expected.items() if part in name)
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
