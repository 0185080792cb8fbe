"""is_plain: True only where a call of the module would do nothing but its class's forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune

from fastattn.nn.plain import is_plain, refresh


class Tagged(torch.Tensor):
    """A tensor subclass, as DTensor and quantised weights are."""


def _replace_forward(linear: torch.nn.Linear) -> None:
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


def _tag_weight(linear: torch.nn.Linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Tagged))


def test_a_new_layer_is_plain() -> None:
    assert is_plain(torch.nn.Linear(2, 3), torch.nn.Linear)
    assert is_plain(torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16), torch.nn.Linear)


def test_training_and_frozen_weights_change_nothing() -> None:
    linear = torch.nn.Linear(2, 2).eval().requires_grad_(False)
    assert is_plain(linear, torch.nn.Linear)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        parametrizations.weight_norm,
        lambda m: prune.l1_unstructured(m, "weight", 1),
        _replace_forward,
        _tag_weight,
        lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.detach().to_sparse())),
    ],
    ids=[
        "forward hook",
        "forward pre-hook",
        "backward hook",
        "backward pre-hook",
        "parametrised",
        "pruned",
        "forward replaced",
        "tensor subclass",
        "sparse",
    ],
)
def test_what_a_call_would_add(change: Callable[[torch.nn.Linear], object]) -> None:
    linear = torch.nn.Linear(2, 2)
    change(linear)
    assert not is_plain(linear, torch.nn.Linear)


def test_plain_again_after_the_hook_is_removed() -> None:
    linear = torch.nn.Linear(2, 2)
    linear.register_forward_hook(lambda *_: None).remove()
    assert is_plain(linear, torch.nn.Linear)


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_for_every_module(register: Callable) -> None:
    linear = torch.nn.Linear(2, 2)
    handle = register(lambda *_: None)
    try:
        assert not is_plain(linear, torch.nn.Linear)
    finally:
        handle.remove()
    assert is_plain(linear, torch.nn.Linear)


def test_other_classes() -> None:
    class Louder(torch.nn.Linear):
        pass

    assert not is_plain(Louder(2, 2), torch.nn.Linear)
    assert is_plain(Louder(2, 2), Louder)
    assert not is_plain(torch.nn.Identity(), torch.nn.Linear)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: prune.l1_unstructured(m, "weight", 1),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
    ids=["pruned", "weight norm", "spectral norm"],
)
def test_refresh_computes_what_a_call_would(change: Callable[[torch.nn.Linear], object]) -> None:
    linear = torch.nn.Linear(3, 2, bias=False)
    change(linear)
    linear.eval()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(1.0)
        refresh(linear)
        computed = linear.weight.clone()
        linear(torch.ones(1, 3))
    assert torch.equal(computed, linear.weight)


def test_refresh_runs_no_other_hook() -> None:
    linear = torch.nn.Linear(2, 2)
    linear.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    refresh(linear)
