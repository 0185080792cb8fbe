"""Examples of a few texts, a small model, and the private run of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.training import Causal, Tokenizer, TrainingConfig
from fastattn.training.contract import Objective
from fastattn.training.data import prepare
from fastattn.training.data.storage import Examples
from fastattn.training.privacy.budget import PrivacyConfig
from fastattn.training.privacy.gradients import PrivateGradients
from fastattn.training.privacy.sampling import Key, Sampled

TOKENIZER = Tokenizer.train(["a"], 257)  # bytes
# Of several lengths, one of them beyond the context of 24.
TEXTS = [f"{i * 37 % 101} bottles " * (1 + i % 4) for i in range(30)]
CONFIG = TrainingConfig(
    steps=6, batch_size=5, context=24, learning_rate=1e-2, final_learning_rate=1e-3,
    warmup_steps=2, evaluation_interval=3, max_gradient_norm=0.5,
)  # fmt: skip


def examples(
    folder: Path, objective: Objective | None = None, texts: list[str] = TEXTS
) -> Examples:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return prepare(file, objective or Causal(TOKENIZER), folder / "prepared")


def model(seed: int = 0, **changes: Any) -> fastattn.GPT:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    subject = fastattn.GPT(fastattn.GPTConfig(vocab_size=257, **{**sizes, **tokens, **changes}))
    with torch.no_grad():
        for parameter in subject.parameters():  # no gradient is nearly 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return subject


def private(
    folder: Path, config: TrainingConfig = CONFIG, key: int = 1, **settings: Any
) -> PrivateGradients:
    settings = {"noise_multiplier": 1.0, "delta": 1e-3, **settings}
    sampled = Sampled(
        examples(folder), Causal(TOKENIZER), config.batch_size, config.context, Key(key)
    )
    return PrivateGradients(PrivacyConfig(**settings), sampled, config)
