"""The numeric rule: ours may be off by twice what plain PyTorch is off by in the same dtype.

    max|ours - ref| <= 2 max|eager - ref| + atol
    rms(ours - ref) <= 1.5 rms(eager - ref) + atol

`ref` is computed in float64 on the same, already rounded, inputs; `eager` is the plain formula in
the inputs' dtype; atol is a few units in the last place of the result's scale. Nothing else decides
that a result is right.
"""

from __future__ import annotations

import torch

ULPS = 4


def assert_close_to_reference(
    ours: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
    *,
    name: str = "result",
    max_factor: float = 2.0,
    rms_factor: float = 1.5,
    ulps: int = ULPS,
    terms: float = 0.0,
) -> None:
    """Raise AssertionError, with the worst element, unless `ours` holds the rule.

    `terms` is the scale of the terms of which the result is a sum; it counts where they cancel to
    nothing (with a single key, dS = p (dP - delta) is zero), so that the result has no scale.
    """
    assert ours.shape == reference.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    )
    reference = reference.detach().double().cpu()
    dtype = ours.dtype
    ours, eager = ours.detach().double().cpu(), eager.detach().double().cpu()
    # Infinities (an LSE of -inf) must stand at the same places; the rest is compared.
    infinite = reference.isinf()
    assert torch.equal(ours.isinf(), infinite) and torch.equal(
        ours[infinite], reference[infinite]
    ), f"{name}: infinities differ from the reference's"
    finite = ~infinite
    ours, eager, reference = ours[finite], eager[finite], reference[finite]
    if reference.numel() == 0:
        return
    scale = reference.abs().max().item()
    if scale <= torch.finfo(dtype).eps * terms:
        scale = terms
    atol = ulps * torch.finfo(dtype).eps * max(scale, torch.finfo(dtype).tiny)
    error, allowed = (ours - reference).abs(), (eager - reference).abs()
    assert not ours.isnan().any(), f"{name}: {int(ours.isnan().sum())} of {ours.numel()} are NaN"
    max_bound = max_factor * allowed.max().item() + atol
    rms_bound = rms_factor * allowed.square().mean().sqrt().item() + atol
    worst = int(error.argmax())
    assert error.max().item() <= max_bound, (
        f"{name}: max error {error.max():.3e} > {max_bound:.3e} (eager {allowed.max():.3e}, "
        f"atol {atol:.1e}) at flat index {worst}: {ours[worst]:.8g} instead of "
        f"{reference[worst]:.8g}; {(error > max_bound).double().mean():.1%} of {error.numel()} fail"
    )
    rms = error.square().mean().sqrt().item()
    assert rms <= rms_bound, f"{name}: rms error {rms:.3e} > {rms_bound:.3e} (atol {atol:.1e})"
