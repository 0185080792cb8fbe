"""The numeric rule (fastattn/rule.py) as an assertion."""

from __future__ import annotations

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
