"""`fastattn demo` in its smallest size, whole: what it leaves behind and what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.cli import main
from fastattn.cli.demo import pretrained, trained
from fastattn.cli.demo.trained import PROMPTS
from fastattn.training import History


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quick demo's folder and output."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo") / "out"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(
            ["demo", "--quick", "--steps", "12", "--out", str(folder), "--device", "cpu", "--debug"]
        )
    assert code == 0, out.getvalue()
    return folder, out.getvalue()


def test_the_folder_is_whole(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    present = {path.name for path in folder.iterdir()}
    assert present >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "history.json", "loss.png", "measured.json",
    }  # fmt: skip
    assert not [name for name in present if name.startswith(".")]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_record_is_that_of_a_run_that_learnt(finished: tuple[Path, str]) -> None:
    folder, out = finished
    history = History.load(folder / "history.json")
    assert len(history.steps) == 12
    assert history.evaluations[-1].loss < history.evaluations[0].loss
    assert f"{history.tokens_per_second:,.0f} tokens/s" in out
    assert f"validation: loss {history.evaluations[-1].loss:.4f}" in out


def test_every_prompt_is_continued(finished: tuple[Path, str]) -> None:
    _, out = finished
    for prompt in PROMPTS:
        assert re.search(rf"^ +\[{prompt}\].+", out, re.MULTILINE)


def test_what_is_measured_is_printed_and_kept(finished: tuple[Path, str]) -> None:
    folder, out = finished
    measured = json.loads((folder / "measured.json").read_text())
    english, chinese = measured["bits_per_byte"].values()
    assert 1 < chinese < english < 8
    assert "read back, its logits are identical" in out
    assert f"bits per byte: english {english:.2f}, chinese {chinese:.2f}" in out
    swapped = {
        "Qwen3ForCausalLM": {"Qwen3RMSNorm": 9, "Qwen3Attention": 2, "Qwen3MLP": 2, "Linear": 1},
        "GPT2LMHeadModel": {"LayerNorm": 5, "GPT2Attention": 2, "GPT2MLP": 2, "Linear": 1},
    }
    assert {c["model"]: c["swapped"] for c in measured["comparisons"]} == swapped
    assert "5 LayerNorm, 2 GPT2Attention, 2 GPT2MLP" in out
    for comparison in measured["comparisons"]:
        assert (comparison["dtype"], comparison["device"]) == ("float32", "cpu")
        assert comparison["same_tokens"] and "8 tokens, identical" in out
        for work, seconds in comparison["seconds"].items():
            first = f"{1e3 * seconds['original']:.1f}"
            assert re.search(rf"^ +{work} +original {first}", out, re.MULTILINE)
            assert f"accelerated {1e3 * seconds['accelerated']:.1f} (" in out


def test_a_failed_proof_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(model: torch.nn.Module) -> None:
        raise RuntimeError("these modules do not compute what their original class computes")

    monkeypatch.setattr(fastattn, "verify", verify)
    command = ["demo", "--quick", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 1
    assert "these modules do not compute" in capsys.readouterr().err


def test_a_chat_model_is_asked_with_and_without_fastattn(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A Llama of random weights in place of the pretrained one."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished[0])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    found = pretrained.compare(model, tokenizer, torch.device("cpu"))
    out = capsys.readouterr().out
    assert found.same_tokens and f"{pretrained.NEW_TOKENS} tokens, identical" in out
    assert re.search(r"speed +original \d+\.\d tokens/s, accelerated \d+\.\d tokens/s: \d", out)


@pytest.mark.long
def test_the_real_pretrained_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    if pretrained.missing() is not None:
        pytest.skip(str(pretrained.missing()))
    assert pretrained.show(torch.device("cpu")).same_tokens
    assert re.search("answer +Attention in a neural network.*focus", capsys.readouterr().out)


@pytest.mark.parametrize("fast", [False, True])
def test_it_trains_in_bfloat16_only_where_that_is_fast(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    on_cpu, on_gpu = (
        trained.configuration(trained.QUICK, None, 0, torch.device(name))
        for name in ("cpu", "cuda")
    )
    assert on_cpu.precision == ("bfloat16" if fast else "float32")
    assert on_gpu.precision == "bfloat16"


def test_ctrl_c_saves_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = trained.train

    def interrupted(*args: Any, on_progress: Any, **options: Any) -> History:
        def stop(history: History) -> None:
            on_progress(history)
            if len(history.steps) == 2:
                raise KeyboardInterrupt

        return original(*args, on_progress=stop, **options)

    monkeypatch.setattr(trained, "train", interrupted)
    command = ["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 130
    assert "interrupted after 2 steps" in capsys.readouterr().out
    assert len(History.load(tmp_path / "history.json").steps) == 2
    fastattn.GPT.from_pretrained(tmp_path)
