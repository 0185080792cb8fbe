"""Train and eval mode for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def in_mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """`model` in train or eval mode; afterwards each of its modules has its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    if any(was != training for _, was in before):
        model.train(training)
    try:
        yield
    finally:
        for module, was in before:  # from the outside in
            if module.training != was:
                module.train(was)  # not only the flag: a module may do more in it
        for module, was in before:
            module.training = was
