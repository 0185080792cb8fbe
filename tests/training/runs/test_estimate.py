"""The cost of a run: operations by the formula and by torch's counter, memory tensor by tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.chips import peak_flops
from fastattn.training.runs.estimate import Allocated, flops_per_token

B, T = 3, 32


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"positions": "rotary"}])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """On the backend whose attention is two products that torch counts, masked scores included."""
    config = fastattn.GPTConfig(
        vocab_size=331, n_positions=T, n_embd=48, n_layer=3, n_head=4, n_kv_head=2, head_size=8,
        bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    model = fastattn.GPT(config)
    tokens = torch.randint(331, (B, T))
    with FlopCounterMode(display=False) as counter, fastattn.use_backend("reference"):
        _, loss = model(tokens, tokens)
        loss.backward()
    assert flops_per_token(model, T) == counter.get_total_flops() / (B * T)


def test_frozen_weights_cost_less() -> None:
    model = fastattn.GPT(fastattn.GPTConfig.preset("gpt2", n_layer=1, n_embd=48, n_head=2))
    whole = flops_per_token(model, T)
    head = model.lm_head.weight.numel()
    model.lm_head.weight.requires_grad_(False)
    assert whole is not None and flops_per_token(model, T) == whole - 2 * head
    both = fastattn.models.EncoderDecoderConfig(d_model=16, encoder_layers=1, decoder_layers=1)
    assert flops_per_token(fastattn.models.EncoderDecoder(both), T) is None


def test_memory_comes_and_goes() -> None:
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(50, 100)
    matrix, rows = 40_000, 20_000  # bytes
    with Allocated([weight, x]) as allocated:
        y = x @ weight
        assert (allocated.now, allocated.peak) == (rows, rows)
        z = y.view(-1)[3:]  # of the same memory
        loss = (z * z).sum()
        assert allocated.now == rows + 4
        loss.backward()
        del y, z, loss
        assert allocated.now == matrix
    assert weight.grad is not None and rows + matrix <= allocated.peak <= 5 * rows + matrix


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362.05), ("NVIDIA RTX A3000 Laptop GPU", None),
        ("NVIDIA RTX A1000", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)
