"""Modules and tensors are made where the session's kernels run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    if device != "cpu":
        torch.set_default_device(device)
    yield
    torch.set_default_device(None)
