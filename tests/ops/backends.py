"""The backends that the tests of the ops run, and what each of them computes in."""

from __future__ import annotations

import torch

BACKENDS = ("reference", "torch", "triton", "cuda")  # and attention has "gluon"


def widest(backend: str | None) -> torch.dtype:
    """float32, but for the products of `cuda` and `gluon`, which compute in 16 bits."""
    return torch.float16 if backend in ("cuda", "gluon") else torch.float32


def assert_near(
    ours: torch.Tensor, exact: torch.Tensor, *, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """`ours` is `exact` within the tolerances of float32, or within ten roundings to 16 bits."""
    if ours.dtype.itemsize == 2:
        rtol = atol = 10 * torch.finfo(ours.dtype).eps / 2
    torch.testing.assert_close(ours.double(), exact.double(), rtol=rtol, atol=atol)
