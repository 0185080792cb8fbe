"""linear, forward and backward, at every tile of the product and at the derivative's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.linear.cases import Case, check
from sweep.device import DEVICE, DTYPES
from sweep.test_ffn import ACTIVATIONS, SHAPES, table


@pytest.mark.long
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_triton(
    name: str, dtype: str, bias: bool, keep: Callable[[Any], None], taken: list[Any]
) -> None:
    tokens, features, hidden = SHAPES[name]
    kind = getattr(torch, dtype)
    shape = tokens, features
    keep(check(Case(shape, hidden, kind, ACTIVATIONS[name], bias, DEVICE.type), "triton"))
    assert {*taken} == {table(kind.itemsize, False)[name]}
