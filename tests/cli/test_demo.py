"""`fastattn demo` in its smallest size, whole: what it leaves behind and what it prints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.cli import demo, main
from fastattn.training import History, Tokenizer


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
        "history.json", "loss.png", "comparison.json",
    }  # fmt: skip
    assert not [name for name in present if name.startswith(".")]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_record_is_that_of_a_run_that_learnt(finished: tuple[Path, str]) -> None:
    folder, out = finished
    history = History.load(folder / "history.json")
    assert len(history.steps) == 12
    assert history.evaluations[-1].loss < history.evaluations[0].loss
    assert f"{history.tokens_per_second:,.0f} tokens/s" in out
    assert f"-> {history.evaluations[-1].loss:.3f}" in out


def test_the_model_is_read_by_us_and_by_transformers(finished: tuple[Path, str]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, out = finished
    assert "the logits are identical" in out
    tokenizer = Tokenizer.load(folder)
    ids = torch.tensor([tokenizer.encode("And God said")])
    ours = fastattn.GPT.from_pretrained(folder).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(folder)("And God said")["input_ids"] == (
        ids[0].tolist()
    )


def test_both_prompts_are_continued(finished: tuple[Path, str]) -> None:
    _, out = finished
    for prompt in ("今天天气很好", "And God said unto"):
        assert re.search(rf"^{prompt} \.\.\.\n  greedy   .*\n  sampled  ", out, re.MULTILINE)


def test_the_table_prints_what_was_measured(finished: tuple[Path, str]) -> None:
    folder, out = finished
    (measured,) = json.loads((folder / "comparison.json").read_text())
    assert (measured["dtype"], measured["device"]) == ("float32", "cpu")
    assert {entry["backend"] for entry in measured["report"]["swapped"]} == {"torch"}
    for row in measured["differences"]:
        assert row["holds"] and math.isfinite(row["absolute"])
        assert f"{row['absolute']:.2e}" in out and f"{row['error']:.2e}" in out
    assert len(measured["speeds"]) == 4
    for row in measured["speeds"]:
        assert row["name"] in out
        assert f"{row['ratio']:.2f}x" in out


def test_a_broken_rule_is_an_exit_code(
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import dataclasses

    original = demo.compare

    def broken(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        wrong = dataclasses.replace(found.differences[0], holds=False)
        return dataclasses.replace(found, differences=(wrong, *found.differences[1:]))

    monkeypatch.setattr(demo, "compare", broken)
    command = ["demo", "--quick", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "BROKEN" in captured.out
    assert "torch.float32 breaks the numeric rule" in captured.err


def test_ctrl_c_saves_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = demo.train

    def interrupted(*args: Any) -> History:
        *rest, on_progress = args

        def stop(history: History) -> None:
            on_progress(history)
            if len(history.steps) == 2:
                raise KeyboardInterrupt

        return original(*rest, stop)

    monkeypatch.setattr(demo, "train", interrupted)
    command = ["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 130
    assert "interrupted after 2 steps" in capsys.readouterr().out
    assert len(History.load(tmp_path / "history.json").steps) == 2
    fastattn.GPT.from_pretrained(tmp_path)
