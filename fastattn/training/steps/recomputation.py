"""Activation checkpointing: blocks that keep only their input, and run again in the backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fastattn.nn import TransformerBlock


@contextlib.contextmanager
def recomputed_blocks(model: torch.nn.Module) -> Iterator[None]:
    """The blocks of `model` run under `torch.utils.checkpoint`: the same results in less memory
    (Chen et al. 2016, arXiv:1604.06174). Dropout draws the same again.

    These are the `TransformerBlock`s of our models; one of transformers does it itself.

    Raises:
        ValueError: the model has neither.
    """
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    theirs: Any = model
    # The second name is the older one.
    names = [n for n in ("activation", "gradient") if hasattr(model, f"{n}_checkpointing_enable")]
    if blocks:
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    elif names:
        getattr(theirs, f"{names[0]}_checkpointing_enable")({"use_reentrant": False})
    else:
        raise ValueError(
            f"activation_checkpointing: {type(model).__name__} has no fastattn.nn.TransformerBlock "
            "and no gradient_checkpointing_enable, so that it is not known what to compute again: "
            "wrap its blocks in torch.utils.checkpoint and leave the option out"
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        if not blocks:
            getattr(theirs, f"{names[0]}_checkpointing_disable")()
