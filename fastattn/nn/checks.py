"""Arguments of constructors and configs: their types and ranges."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``known``."""
    if value not in (known := tuple(known)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_integer(name: str, value: Any, at_least: int | None = None, otherwise: str = "") -> int:
    """``value`` as an int; TypeError if it is no integer, ValueError if it is too small.

    ``otherwise`` says what else the argument may be, e.g. " or None".
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer{otherwise}, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """``value`` as a float; TypeError if it is no real number, ValueError if no float holds it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large: {error}") from error


def check_within(name: str, value: Any, interval: str, words: str = "") -> float:
    """``value`` as a float in an interval, as "(0, 1]"; TypeError or ValueError if it is not.

    ``words`` say in the error what it must be, in place of the interval.
    """
    low, high = map(float, interval[1:-1].split(","))
    number = check_number(name, value)
    inside = low < number < high or (number == low and interval[0] == "[")
    if not inside and not (number == high and interval[-1] == "]"):
        raise ValueError(f"{name} must be {words or f'in {interval}'}, got {value!r}")
    return number


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_probability(name: str, p: Any) -> float:
    """``p`` as a float; TypeError or ValueError unless it is a dropout's probability, in [0, 1)."""
    return check_within(name, p, "[0, 1)")


def check_positive(name: str, size: Any) -> int:
    """``size`` as an int; TypeError or ValueError unless it is a positive integer."""
    size = check_integer(name, size)
    if size <= 0:
        raise ValueError(f"{name} must be positive, got {size}")
    return size


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError unless a `torch.Generator` takes ``seed``."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(
            f"{name} must be from -2**63 to 2**64 - 1, got {seed}: take it modulo 2**64"
        )
