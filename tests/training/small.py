"""A small model, a stream that it learns in a second, and the run of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import fastattn
from fastattn.training import Causal, History, Tokenizer, TrainingConfig, Windows, train

VOCABULARY = 17
# A cycle that the next token follows from the last one: the loss can go to zero.
STREAM = torch.arange(2000) * 5 % VOCABULARY
HELD_OUT = STREAM[:300]
CONFIG = TrainingConfig(
    steps=60, batch_size=4, context=16, learning_rate=1e-2, final_learning_rate=1e-3,
    warmup_steps=5, evaluation_interval=25, evaluation_tokens=256,
)  # fmt: skip
LLAMA = {"positions": "rotary", "norm": "rms_norm", "gated": True, "tie_word_embeddings": False}
OBJECTIVE = Causal(Tokenizer.train(["a"], 257))


def model(seed: int = 0, dropout: float = 0.0, **changes: Any) -> fastattn.GPT:
    torch.manual_seed(seed)
    config = fastattn.GPTConfig(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2,
        embd_pdrop=dropout, resid_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        **{"attn_pdrop": dropout, **changes},
    )  # fmt: skip
    return fastattn.GPT(config)


def windows(stream: torch.Tensor = STREAM, config: TrainingConfig = CONFIG) -> Windows:
    return Windows(stream, config.batch_size, config.context, config.seed)


def trained(subject: torch.nn.Module, config: TrainingConfig = CONFIG, **how: Any) -> History:
    """`train` on windows of the stream, validated on others unless `how` says otherwise."""
    how = {"validation": windows(HELD_OUT, config), **how}
    return train(subject, OBJECTIVE, windows(config=config), config, **how)


def stopping(steps: int) -> Callable[[History], None]:
    """A callback that ends a run after so many steps, as Ctrl-C does."""

    def stop(history: History) -> None:
        if len(history.steps) == steps:
            raise KeyboardInterrupt

    return stop


def with_changes(**changes: Any) -> TrainingConfig:
    return dataclasses.replace(CONFIG, **changes)


def weights(subject: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights."""
    return {name: value.clone() for name, value in subject.state_dict().items()}


def same(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
