"""transformers' Trainer on an accelerated model."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

import fastattn
from oracle import assert_close_to_reference

pytest.importorskip("accelerate", reason="the Trainer runs on it")


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen rows of a cycle of tokens: easy to learn."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(24) + index) % 13 + 2
        return {"input_ids": row, "labels": row}


def train(
    model: torch.nn.Module, folder: Path, device: str, data: Any = None, collate: Any = None,
    **changes: Any,
) -> list[float]:  # fmt: skip
    """The losses of the steps."""
    set_seed(0)
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 8, **changes}
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **settings,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data or Text(), data_collator=collate
    )
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


class Sentences(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Of lengths that differ."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = [(i + index) % 13 + 2 for i in range(5 + (7 * index) % 11)]
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize("lengths", [False, True], ids=["position_ids", "and cu_seq_lens"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_batches_are_those_of_single_sequences(
    family: str, lengths: bool, device: str
) -> None:
    """DataCollatorWithFlattening without flash-attn: logits and gradients of each text alone."""
    from integrations import tiny
    from transformers import DataCollatorWithFlattening

    rows = [Sentences()[i] for i in range(4)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths)
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in collate(rows).items()
    }
    assert ("cu_seq_lens_q" in batch) == lengths
    original = tiny.make(family, device)
    exact = tiny.exact(original)

    def alone(model: torch.nn.Module) -> torch.Tensor:
        ids = [torch.tensor([row["input_ids"]], device=device) for row in rows]
        return torch.cat([model(each).logits for each in ids], 1)

    def results(model: torch.nn.Module, logits: torch.Tensor) -> list[torch.Tensor]:
        gradients = torch.autograd.grad(torch.sin(logits).sum(), [*model.parameters()])
        return [logits.detach(), *gradients]

    model = copy.deepcopy(original)
    assert fastattn.accelerate(model).swapped
    labels = batch.pop("labels")
    assert (labels[0, [0, *itertools.accumulate(len(r["input_ids"]) for r in rows[:3])]] < 0).all()
    found = results(model, model(**batch).logits)
    eager, wanted = results(original, alone(original)), results(exact, alone(exact))
    for number, tensors in enumerate(zip(found, eager, wanted, strict=True)):
        assert_close_to_reference(*tensors, name=str(number))


@pytest.mark.parametrize("name", ["accelerate", "fastattn"])
def test_trains_on_packed_batches_as_on_single_sequences(
    name: str, device: str, tmp_path: Path
) -> None:
    """The Trainer, with accumulated gradients: the losses of the original, one text at a time."""
    from integrations import tiny
    from transformers import DataCollatorWithFlattening

    def losses(model: torch.nn.Module, packed: bool) -> list[float]:
        sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        if not packed:
            sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        return train(
            model, tmp_path, device, Sentences(), DataCollatorWithFlattening(), **sizes,
            max_steps=4, save_strategy="no", remove_unused_columns=False,
        )  # fmt: skip

    expected = losses(tiny.make("llama", device), packed=False)
    model = tiny.make("llama", device)
    if name == "accelerate":
        assert fastattn.accelerate(model).swapped
    else:
        import fastattn.integrations.huggingface as face

        model.set_attn_implementation(face.NAME)
    found = losses(model, packed=True)
    assert len(found) == 4 and found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-3)
