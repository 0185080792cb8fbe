"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank updates beside linear layers, by peft.

The model keeps its class: adapters are put into its layers, and merged into their weights at the
end, so that what is saved is a plain model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from fastattn.training.optional import require

if TYPE_CHECKING:
    from fastattn.training.runs.settings import ModelSettings


def add(model: torch.nn.Module, settings: ModelSettings) -> None:
    """Freeze `model` and put the adapters into it that the settings ask for.

    Raises:
        ValueError: no layer's name ends as lora_targets says.
        ImportError: peft is not installed.
    """
    peft = require("peft", "lora", "lora_rank")
    targets = settings.lora_targets
    if targets == "all-linear":
        targets = _linear_of_blocks(model)
    elif isinstance(targets, str):
        targets = (targets,)
    config = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(map(_is_conv1d, model.modules())),
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"lora_targets {targets!r}: {error}") from error


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` with the adapters' updates added to the weights, and plain layers.

    A copy, since taking the updates away again would not give the weights back bit for bit.
    """
    layers = require("peft.tuners.lora", "lora", "lora_rank").LoraLayer
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, layers):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    return plain


def _linear_of_blocks(model: torch.nn.Module) -> tuple[str, ...]:
    """The names of the linear layers inside the model's `torch.nn.ModuleList`s."""
    return tuple(
        f"{prefix}.{name}"
        for prefix, blocks in model.named_modules()
        if isinstance(blocks, torch.nn.ModuleList)
        for name, module in blocks.named_modules()
        if isinstance(module, torch.nn.Linear) or _is_conv1d(module)
    )


def _is_conv1d(module: torch.nn.Module) -> bool:
    """Whether it is transformers' linear layer with a transposed weight, which GPT-2 has."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
