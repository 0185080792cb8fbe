"""Activation checkpointing: the same bits, less memory, and nothing left on the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from training.small import (
    OBJECTIVE,
    STREAM,
    VOCABULARY,
    model,
    same,
    trained,
    weights,
    windows,
    with_changes,
)

from fastattn.training import Windows, train
from fastattn.training.contract import Batch
from fastattn.training.steps.recomputation import recomputed_blocks


def test_results_are_the_same_bits_with_dropout() -> None:
    subjects = model(dropout=0.2), model(dropout=0.2)
    config = with_changes(steps=4)
    plain = trained(subjects[0], config)
    recomputed = trained(subjects[1], with_changes(steps=4, activation_checkpointing=True))
    assert plain == recomputed and same(*map(weights, subjects))
    assert not any("forward" in vars(module) for module in subjects[1].modules())


def test_a_block_keeps_only_what_it_is_given() -> None:
    subject = model()
    arguments = windows().batch(0).arguments

    def kept_bytes() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            subject(**arguments)[1].backward()
        return sum(sizes.values())

    whole = kept_bytes()
    with recomputed_blocks(subject):
        assert kept_bytes() < 0.6 * whole


def test_a_model_of_transformers_does_it_itself() -> None:
    transformers = pytest.importorskip("transformers")

    class Labelled(Windows):
        def batch(self, index: int) -> Batch:
            batch = super().batch(index)
            ids = batch.arguments["input_ids"]
            arguments = {"input_ids": ids, "labels": ids, "use_cache": False}
            return dataclasses.replace(batch, arguments=arguments)

    losses = []
    for option in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, attention_dropout=0.1,
        )  # fmt: skip
        subject = transformers.LlamaForCausalLM(config)
        changes = with_changes(steps=3, activation_checkpointing=option)
        losses.append(train(subject, OBJECTIVE, Labelled(STREAM, 4, 16), changes).steps)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in subject.modules())
    assert losses[0] == losses[1]


def test_a_model_without_blocks_is_refused() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> object:
            logits = self.embedding(input_ids)
            return logits, torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten()
            )

    trained(Bare(), with_changes(steps=1))
    with pytest.raises(ValueError, match=r"activation_checkpointing: Bare has no fastattn.nn.Tr"):
        trained(Bare(), with_changes(steps=1, activation_checkpointing=True))
