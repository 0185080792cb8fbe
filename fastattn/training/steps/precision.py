"""The number formats of a run: autocast, and the scaled loss that float16 needs."""

from __future__ import annotations

import contextlib

import torch


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context in which the model runs, by `TrainingConfig.precision`."""
    dtype = reduced_dtype(device, precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def reduced_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The dtype of products, by `TrainingConfig.precision`; None for that of the weights."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return None if precision == "float32" else getattr(torch, precision)


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """For float16 the scaler that keeps small gradients above its smallest number; else one that
    does nothing (Micikevicius et al. 2018, arXiv:1710.03740)."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32: a GPU, a CPU with AVX-512 BF16."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
