"""transformers' Trainer on an accelerated model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

import fastattn

pytest.importorskip("accelerate", reason="the Trainer runs on it")


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen rows of a cycle of tokens: easy to learn."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(24) + index) % 13 + 2
        return {"input_ids": row, "labels": row}


def train(model: GPT2LMHeadModel, folder: Path, device: str, **changes: Any) -> list[float]:
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **changes,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Text())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["plain", "checkpointing", "bf16"],
)
def test_trains_alike(make_gpt2: Any, device: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = train(make_gpt2(initializer_range=0.02), tmp_path / "plain", device, **changes)
    model = make_gpt2(initializer_range=0.02)
    assert fastattn.accelerate(model).swapped
    found = train(model, tmp_path / "accelerated", device, **changes)
    assert len(found) == 8
    assert found[-1] < 0.75 * found[0]
    assert found == pytest.approx(expected, rel=5e-2 if "bf16" in changes else 1e-3)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "accelerated" / "checkpoint-8")
    assert type(loaded.transformer.h[0].attn) is GPT2Attention
    torch.testing.assert_close(loaded.to(device).state_dict(), model.state_dict())
