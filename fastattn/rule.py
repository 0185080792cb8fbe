"""The numeric rule: ours may be off by twice what plain PyTorch is off by in the same dtype.

    max|ours - ref| <= 2 max|eager - ref| + atol
    rms(ours - ref) <= 1.5 rms(eager - ref) + atol

`ref` is computed in float64 on the same, already rounded, inputs; `eager` is the plain formula, or
the original module, in the inputs' dtype; atol is a few units in the last place of the result's
scale. Tests, the proof before a swap and benchmarks hold results to it; nothing else decides that a
result is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_FACTOR = 2.0
RMS_FACTOR = 1.5
ULPS = 4.0


def atol(dtype: torch.dtype, scale: float, ulps: float = ULPS) -> float:
    """`ulps` units in the last place of `dtype` at `scale`, the largest absolute value."""
    info = torch.finfo(dtype)
    return ulps * info.eps * max(scale, info.tiny)


@dataclass(frozen=True)
class Comparison:
    """Errors against float64 of a result and of eager's.

    Attributes:
        max, rms: of ours.
        eager_max, eager_rms: of eager's.
        violation: how the rule is broken, None if it holds.
    """

    max: float
    rms: float
    eager_max: float
    eager_rms: float
    violation: str | None


def compare(
    ours: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
    *,
    max_factor: float = MAX_FACTOR,
    rms_factor: float = RMS_FACTOR,
    ulps: float = ULPS,
    terms: float = 0.0,
) -> Comparison:
    """Compare `ours` with `reference`, a result in float64, by what `eager` is off by.

    An infinity of the reference (an LSE of -inf) must be one of ours; the rest is compared. NaN, in
    ours or in eager's, breaks the rule.

    Args:
        ours, eager, reference: of one shape, on one device.
        max_factor, rms_factor: what ours may be off by, in units of eager's error.
        ulps: units in the last place that ours may be off by in any case.
        terms: the scale of the terms of which the result is a sum. It counts where they cancel to
            nothing (with a single key, dS = p (dP - delta) is zero), so that the result has no
            scale.

    Raises:
        ValueError: the shapes differ.
    """
    for name, x in (("result", ours), ("eager result", eager)):
        if x.shape != reference.shape:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)}, expected {tuple(reference.shape)}, the "
                "reference's"
            )
    if not reference.numel():
        return Comparison(0.0, 0.0, 0.0, 0.0, None)
    dtype = ours.dtype
    ours, eager, reference = (x.detach().double() for x in (ours, eager, reference))
    peak = reference.abs().max()
    # Most results are finite, and the proof of a model compares many large ones.
    infinite = None if peak.isfinite() else reference.isinf()
    count = reference.numel()
    if infinite is not None:
        peak = reference.abs().masked_fill(infinite, 0.0).max()
        count -= int(infinite.sum())
    scale = peak.item()
    if scale <= torch.finfo(dtype).eps * terms:
        scale = terms
    slack = atol(dtype, scale, ulps)

    def off(x: torch.Tensor) -> torch.Tensor:
        difference = (x - reference).abs_()
        return difference if infinite is None else difference.masked_fill_(infinite, 0.0)

    error, allowed = off(ours), off(eager)
    largest, eager_max = error.max().item(), allowed.max().item()
    norms = (torch.linalg.vector_norm(x).item() for x in (error, allowed))
    rms, eager_rms = (norm / max(count, 1) ** 0.5 for norm in norms)
    max_bound, rms_bound = max_factor * eager_max + slack, rms_factor * eager_rms + slack
    violation = None
    if _infinities_differ(ours, reference, infinite):
        violation = "infinities differ from the reference's"
    elif ours.isnan().any():
        violation = f"{int(ours.isnan().sum())} of {ours.numel()} are NaN"
    elif not largest <= max_bound:
        worst = int(error.argmax())
        violation = (
            f"max error {largest:.3e} against float64, above {max_factor:g} * {eager_max:.3e} + "
            f"{slack:.1e}, at flat index {worst}: {ours.flatten()[worst]:.8g} instead of "
            f"{reference.flatten()[worst]:.8g}; {(error > max_bound).double().mean():.1%} of "
            f"{count} fail"
        )
    elif not rms <= rms_bound:
        violation = (
            f"rms error {rms:.3e} against float64, above {rms_factor:g} * {eager_rms:.3e} + "
            f"{slack:.1e}"
        )
    return Comparison(largest, rms, eager_max, eager_rms, violation)


def _infinities_differ(
    ours: torch.Tensor, reference: torch.Tensor, infinite: torch.Tensor | None
) -> bool:
    if infinite is None:
        return bool(ours.isinf().any())
    same = torch.equal(ours.isinf(), infinite)
    return not same or not torch.equal(ours[infinite], reference[infinite])
