"""A plain norm on a CPU goes to ATen undescribed: the same bits.

The errors are those of the long way: test_interface.py's calls are plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops import laws

import fastattn
from fastattn.ops.layer_norm import straight

X, W, B = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
NORMS = {
    "layer_norm": lambda *a, **k: fastattn.layer_norm(*a, **k),
    "rms_norm": lambda x, w=None, b=None, **k: fastattn.rms_norm(x, w, 1e-6, **k),
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return laws.went_straight(straight, monkeypatch)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", NORMS)
def test_the_same_bits(name: str, dtype: torch.dtype, went: list[bool]) -> None:
    norm: Callable[..., Any] = NORMS[name]
    for given in ((X, W, B), (X[..., ::2], W[::2], B[::2]), (X, None, None), (X[0, 0], W, None)):
        leaves = [t if t is None else t.to(dtype).requires_grad_() for t in given]
        wanted = [t for t in leaves[: 3 if name == "layer_norm" else 2] if t is not None]
        results = []
        for backend in (None, "torch"):  # a call that names its backend takes the long way
            out = norm(*leaves, backend=backend)
            results.append([out, *torch.autograd.grad(out.sum(), wanted)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert went == [True] * 4


def test_who_takes_the_long_way(went: list[bool]) -> None:
    for call in (
        lambda: fastattn.layer_norm(X.double(), W.double()),
        lambda: fastattn.layer_norm(X.half(), W),  # parameters of another dtype
        lambda: fastattn.layer_norm(X, W, eps=1),
        lambda: fastattn.rms_norm(X, W),  # eps by the dtype
        lambda: torch.func.vmap(lambda x: fastattn.layer_norm(x, W))(X),
        lambda: fastattn.layer_norm(X.to("meta"), W.to("meta")),
    ):
        call()
    with fastattn.use_backend("reference"), torch.no_grad():
        fastattn.layer_norm(X, W)
    with torch.autocast("cpu", torch.bfloat16):
        fastattn.layer_norm(X, W)
    assert went == [False] * 8
    fastattn.layer_norm(X, W, residual=X)
    assert len(went) == 8
