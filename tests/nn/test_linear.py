"""Linear is torch's in all but the way that a few rows go."""

from __future__ import annotations

import copy

import pytest
import torch

from fastattn import nn


@pytest.mark.parametrize("bias", [False, True])
def test_is_torchs(bias: bool) -> None:
    ours, theirs = (cls(256, 512, bias) for cls in (nn.Linear, torch.nn.Linear))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 1, 256)
    assert torch.equal(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))


def test_class_swap_and_back() -> None:
    module = torch.nn.Linear(256, 512)
    x = torch.randn(1, 256)
    with torch.no_grad():
        before = module(x)
        module.__class__ = nn.Linear
        torch.testing.assert_close(module(x), before)
        module.__class__ = torch.nn.Linear
        assert torch.equal(module(x), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_is_found_by_its_class() -> None:
    """By tables of classes, as quantize_dynamic has; it stays another class than torch's."""
    model = torch.nn.Sequential(nn.Linear(8, 4), torch.nn.Linear(4, 2))
    quantised = torch.ao.quantization.quantize_dynamic(model)
    assert [type(part) for part in quantised] == [torch.nn.quantized.dynamic.Linear] * 2
    assert {torch.nn.Linear: 1}[nn.Linear] == 1
    assert nn.Linear is not torch.nn.Linear and nn.Linear != torch.nn.LayerNorm


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_weights_are_torchs(layout: str) -> None:
    ours, theirs = nn.Linear(256, 512), torch.nn.Linear(256, 512)
    sparse = getattr(torch.randn(512, 256), layout)()
    x = torch.randn(2, 256)
    with torch.no_grad():
        ours.weight = theirs.weight = torch.nn.Parameter(sparse)
        ours.bias = theirs.bias = None
        assert torch.equal(ours(x), theirs(x))
