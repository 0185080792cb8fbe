"""The numeric rule (fastattn/rule.py) as an assertion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastattn import rule


def assert_close_to_reference(
    ours: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
    *,
    name: str = "result",
    **options: Any,
) -> None:
    """Raise AssertionError unless `ours` holds the rule; the options are those of `rule.compare`."""
    tensors = (x.detach().cpu() for x in (ours, eager, reference))
    violation = rule.compare(*tensors, **options).violation
    assert violation is None, f"{name}: {violation}"


FEW = 64


def assert_all_close_to_reference(
    results: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], **options: Any
) -> None:
    """`assert_close_to_reference` of (ours, eager, reference) by name; those of few elements joined.

    The largest of eager's errors measures what rounding does where there are many: of 12 elements it
    is chance, which another processor's order of sums turns.
    """
    few = {name: triple for name, triple in results.items() if triple[2].numel() < FEW}
    for name, triple in results.items():
        if name not in few:
            assert_close_to_reference(*triple, name=name, **options)
    if few:
        joined = (torch.cat([x.flatten() for x in column]) for column in zip(*few.values()))
        assert_close_to_reference(*joined, name=", ".join(few), **options)
