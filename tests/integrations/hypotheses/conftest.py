"""What the tests of the hypotheses share."""

from __future__ import annotations

import pytest
import torch
from integrations.tiny import HIDDEN

from fastattn.integrations.hypotheses import rotation


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.randn(2, 5, HIDDEN, device=device)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our rotation runs, however small the model."""
    monkeypatch.setattr(rotation, "LEAST_ON_CPU", 0)
