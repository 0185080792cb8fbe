"""Small random GPT-2s, ours and transformers', with the same weights; nothing is downloaded.

transformers is imported by the tests only: it imports Triton, before tests/conftest.py has settled
what runs the kernels if this folder is named on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fastattn

if TYPE_CHECKING:
    import transformers

    Pair = tuple[fastattn.GPT, transformers.GPT2LMHeadModel]
    MakePair = Callable[..., Pair]

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    # Far from uniform, so that no mistake drowns and no two tokens tie.
    "initializer_range": 0.3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture
def make_pair(tmp_path: Path, device: str) -> MakePair:
    """`make_pair(seed=0, dtype=float32, **config)`: (ours, transformers'), by way of a folder."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Pair:
        import transformers

        torch.manual_seed(seed)
        config = transformers.GPT2Config(**{**SMALL, **changes})
        theirs = transformers.GPT2LMHeadModel(config)
        with torch.no_grad():  # transformers leaves biases at 0 and norms at 1
            for parameter in theirs.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs = theirs.to(dtype).to(device).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        return fastattn.GPT.from_pretrained(tmp_path / "theirs", device=device), theirs

    return make


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair()


@pytest.fixture
def small() -> dict[str, Any]:
    """The fields of a small `GPTConfig`."""
    return dict(SMALL)
