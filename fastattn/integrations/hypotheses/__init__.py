"""Guesses at a module of an unknown class, from what it contains.

A hypothesis looks at the shapes of a module's parameters, at its children and at its plain
attributes, never at its name, and answers with the `Recogniser`s under which the module could run.
Whether it may, the proof decides (`fastattn.integrations.proof`): a hypothesis only has to be
plausible.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from fastattn.integrations.hypotheses import (
    attention,
    feed_forward,
    inner,
    norm,
    post_norm,
    watching,
)
from fastattn.integrations.hypotheses.head import heads
from fastattn.integrations.recogniser import Recogniser

__all__ = ["heads", "of"]


def of(module: torch.nn.Module) -> Iterator[Recogniser]:
    """The hypotheses that fit `module`, the likeliest first."""
    if "transformers" in sys.modules:
        from fastattn.integrations.huggingface import swap
        from fastattn.integrations.hypotheses import rotary

        yield from rotary.of(module)
        yield from swap.of(module)
    yield from attention.of(module)
    yield from norm.of(module)
    yield from post_norm.of(module)
    yield from feed_forward.of(module)
    yield from inner.of(module)
    yield from watching.of(module)
