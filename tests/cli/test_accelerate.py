"""`fastattn accelerate`: the report and the comparison, on folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastattn.cli import main

transformers = pytest.importorskip("transformers")


def folder(path: Path, cls: str, config: str, **settings: Any) -> str:
    made = getattr(transformers, config)(**settings)
    getattr(transformers, cls)(made).save_pretrained(path)
    return str(path)


GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 3, "vocab_size": 97, "n_positions": 32}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "vocab_size": 97,
}
T5 = {"d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 3, "vocab_size": 97}
VIT = {key: value for key, value in SIZES.items() if key != "vocab_size"}


@pytest.mark.parametrize(
    ("cls", "config", "settings", "found"),
    [
        ("GPT2LMHeadModel", "GPT2Config", GPT2, ("GPT2MLP", "loss", "labels (2, 32)")),
        ("BertModel", "BertConfig", SIZES, ("BertSelfAttention", "pooler_output", "(2, 128)")),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            T5 | {"decoder_start_token_id": 0},
            ("T5Attention", "loss", "labels (2, 128)"),
        ),
        (
            "ViTForImageClassification",
            "ViTConfig",
            VIT | {"image_size": 16, "patch_size": 4},
            ("ViTMLP", "logits", "pixel_values (2, 3, 16, 16)"),
        ),
    ],
)
def test_a_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cls: str,
    config: str,
    settings: dict[str, Any],
    found: tuple[str, ...],
) -> None:
    path = folder(tmp_path, cls, config, **settings)
    before = sorted(tmp_path.rglob("*"))
    assert main(["accelerate", path, "--swap-slower"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{cls}, float32, cpu; ")
    assert "modules swapped" in out and "gradients" in out
    assert all(text in out for text in found)
    assert sorted(tmp_path.rglob("*")) == before


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, "GPT2LMHeadModel", "GPT2Config", **GPT2)
    names = ["--only", "*.mlp", "transformer.ln_f", "--exclude", "*.1.mlp"]
    shape = ["--batch", "1", "--seqlen", "7", "--dtype", "bfloat16", "--train"]
    assert main(["accelerate", path, *shape, *names, "--swap-slower"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16" in out and "input_ids (1, 7)" in out
    assert "fastattn: 2 modules swapped" in out
    assert "forward and backward" in out


def test_user_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any) -> None:
    refused(["accelerate", str(tmp_path / "nothing")], "there is no folder")
    path = folder(tmp_path, "GPT2LMHeadModel", "GPT2Config", **GPT2)
    refused(["accelerate", path, "--batch", "0"], "--batch must be at least 1; got 0")
    assert main(["accelerate", path, "--only", "nrom"]) == 1
    assert "only: 'nrom' matches no module" in capsys.readouterr().err
