"""Small random models of transformers; nothing is downloaded.

transformers is imported by the tests only: see tests/models/conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from integrations import tiny

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    MakeGPT2 = Callable[..., PreTrainedModel]


@pytest.fixture
def make_gpt2(device: str) -> MakeGPT2:
    """A GPT-2 in eval mode: `make_gpt2(cls, attn_implementation=..., **config)`."""

    def make(
        cls: type[PreTrainedModel] | None = None,
        *,
        attn_implementation: str = "sdpa",
        seed: int = 0,
        **changes: Any,
    ) -> PreTrainedModel:
        from transformers import GPT2Config, GPT2LMHeadModel

        # Far from uniform, so that no mistake drowns and no two tokens tie.
        settings = {**tiny.GPT2, "initializer_range": 0.2}
        config = GPT2Config(**{**settings, **changes})
        torch.manual_seed(seed)
        made = (cls or GPT2LMHeadModel)._from_config(
            config, attn_implementation=attn_implementation
        )
        return made.to(device).eval()

    return make


@pytest.fixture
def tokens(device: str) -> torch.Tensor:
    """(batch 3, seqlen 21), neither eos nor padding."""
    return torch.randint(2, 97, (3, 21), generator=torch.Generator().manual_seed(1)).to(device)
