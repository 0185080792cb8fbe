"""What is written loads bit for bit, here and in transformers, and never half."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastattn import GPT, GPTConfig

Pair = tuple[GPT, transformers.GPT2LMHeadModel]
MakePair = Callable[..., Pair]


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        for name in first
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}, {"eos_token_id": [1, 2]}],
    ids=str,
)
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_it_bit_for_bit(
    make_pair: MakePair, tmp_path: Path, changes: dict[str, Any], sharded: bool
) -> None:
    ours, theirs = make_pair(**changes)
    size = sum(p.nbytes for p in ours.parameters())
    ours.save_pretrained(tmp_path / "ours", max_shard_size=size // 2 if sharded else size)
    assert (len(list((tmp_path / "ours").glob("model*.safetensors"))) > 1) == sharded
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert _equal(loaded.to(ours.device), theirs)
    expected = theirs.config.to_dict()
    got = loaded.config.to_dict()
    assert {**got, "_name_or_path": None} == {**expected, "_name_or_path": None}
    assert _equal(GPT.from_pretrained(tmp_path / "ours", device=ours.device), ours)


def test_round_trip_keeps_the_config(small: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "n_inner": 20,
        "resid_pdrop": 0.3,
        "eos_token_id": (3, 4),
        "activation_function": "silu",
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "layer_norm_epsilon": 1e-3,
    }
    model = GPT(GPTConfig(**{**small, **changes}))
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == model.config


def test_other_files_stay_and_a_former_save_goes(pair: Pair, tmp_path: Path) -> None:
    ours, _ = pair
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-card.safetensors").write_text("mine")
    both = {"tokenizer.json", "model-card.safetensors", "config.json", "generation_config.json"}
    for size, weights in (
        (10**9, {"model.safetensors"}),
        (10**5, None),
        (10**9, {"model.safetensors"}),
    ):
        ours.save_pretrained(folder, max_shard_size=size)
        names = set(os.listdir(folder))
        if weights is None:
            assert "model.safetensors.index.json" in names and "model.safetensors" not in names
        else:
            assert names == both | weights
        assert _equal(GPT.from_pretrained(folder, device=ours.device), ours)


@pytest.mark.parametrize("failing", ["save_file", "fsync"])
def test_a_failed_save_leaves_what_was_there(
    pair: Pair, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    ours, _ = pair
    ours.save_pretrained(tmp_path / "ours")
    before = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(
        {"save_file": "safetensors.torch.save_file", "fsync": "os.fsync"}[failing], fail
    )
    with pytest.raises(OSError, match="disk full"):
        GPT(GPTConfig(**small)).save_pretrained(tmp_path / "ours", max_shard_size=10**5)
    assert {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == before


def test_config_json_says_what_it_is(pair: Pair, tmp_path: Path) -> None:
    pair[0].save_pretrained(tmp_path / "ours")
    data = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert data["architectures"] == ["GPT2LMHeadModel"]
    assert (data["model_type"], data["dtype"], data["n_embd"]) == ("gpt2", "float32", 48)


def test_bad_shard_size(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be positive, got 0"):
        pair[0].save_pretrained(tmp_path / "ours", max_shard_size=0)
    assert not (tmp_path / "ours").exists()
