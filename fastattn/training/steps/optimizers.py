"""The optimisers of a run, and which parameters each of them has."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.training.steps.config import TrainingConfig


def optimizers_of(model: torch.nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW for the trained parameters, before it Muon where the config asks for that."""
    groups = decay_groups(model, config.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        on_muon = block_matrices(model)
        matrices = [parameter for parameter in groups[0]["params"] if parameter in on_muon]
        groups[0]["params"] = [p for p in groups[0]["params"] if p not in on_muon]
        if matrices:
            optimizers.append(
                torch.optim.Muon(
                    matrices,
                    config.learning_rate,
                    config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizers.append(
        torch.optim.AdamW(groups, config.learning_rate, betas=config.betas, fused=fused)
    )
    return optimizers


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: what has two dimensions or more decays, vectors do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def block_matrices(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The trained matrices inside the `torch.nn.ModuleList`s of `model`, without embeddings."""
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return {
        parameter
        for block in blocks
        for module in block.modules()
        if not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2 and parameter.requires_grad
    }


def muon_is_fast(device: torch.device) -> bool:
    """Whether `device` has fast bfloat16 products: an update of `torch.optim.Muon` is made of them.

    On a CPU without AVX-512 they take 80 times as long as products in float32 (torch 2.13).
    """
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
