"""`rotary`, forward and backward, at head sizes that fill the tiles and at ones that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.rotary.cases import Case, check
from sweep.device import DEVICE, DTYPES, GPU

SIZES = {
    "head_dim 64": {"head_dim": 64, "full": True},
    "head_dim 128": {"head_dim": 128, "full": True, "before": True},
    "head_dim 256, partial": {"head_dim": 256, "rotary_dim": 64},
    "head_dim 80, partial": {"head_dim": 80, "rotary_dim": 32, "angles": "positions"},
    "head_dim 576": {"head_dim": 576, "rotary_dim": 64},
    "head_dim 4096": {"head_dim": 4096},
}


@pytest.mark.long
@pytest.mark.parametrize("norms", ("", "qk"))
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_triton(
    size: str, dtype: str, interleaved: bool, norms: str, keep: Callable[[Any], None]
) -> None:
    case = Case(
        seqlen=777 if GPU else 21,  # more tokens than programs of the backward with a norm
        heads=17 if GPU else 5,
        kv_heads=4,
        interleaved=interleaved,
        norms=norms,
        dtype=getattr(torch, dtype),
        device=DEVICE.type,
        **SIZES[size],
    )
    keep(check(case, "triton"))
