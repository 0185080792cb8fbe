"""Linear is torch's in all but the way that a few rows go."""

from __future__ import annotations

import copy

import pytest
import torch

from fastattn import nn


@pytest.mark.parametrize("bias", [False, True])
def test_is_torchs(bias: bool) -> None:
    modules = []
    for cls in (nn.Linear, torch.nn.Linear):
        torch.manual_seed(0)
        modules.append(cls(256, 512, bias))
    ours, theirs = modules
    assert isinstance(ours, torch.nn.Linear) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
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


def test_hooks_fire() -> None:
    module, seen = nn.Linear(256, 512), []
    module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        module(torch.randn(1, 256))
    assert seen == [(1, 512)]
