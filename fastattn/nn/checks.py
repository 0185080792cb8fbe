"""What the constructors of several modules ask of their arguments."""

from __future__ import annotations


def check_probability(name: str, p: float) -> None:
    """Raise ValueError unless ``p`` is a dropout probability that leaves something: [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def check_positive(name: str, size: int) -> None:
    """Raise ValueError unless ``size`` is positive."""
    if size <= 0:
        raise ValueError(f"{name} must be positive, got {size}")
