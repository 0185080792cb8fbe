"""in_mode: one mode inside, and each module its own mode afterwards."""

from __future__ import annotations

import pytest
import torch

from fastattn.nn.mode import in_mode


class Merging(torch.nn.Linear):
    """As LoRA layers that merge their weights in eval mode: the mode is more than a flag."""

    merged = False

    def train(self, mode: bool = True) -> Merging:
        self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", ["100", "010", "110", "001", "111", "000"])
def test_modes_inside_and_after(training: bool, before: str) -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(Merging(2, 2)))
    for module, flag in zip(model.modules(), before, strict=True):
        module.train(flag == "1")
    part = model[0][0]
    with pytest.raises(KeyError), in_mode(model, training=training):
        assert all(module.training == training for module in model.modules())
        assert part.merged != training
        raise KeyError
    assert [module.training for module in model.modules()] == [flag == "1" for flag in before]
    assert part.merged != part.training


def test_a_module_at_two_places() -> None:
    shared = torch.nn.Dropout()
    model = torch.nn.ModuleList([torch.nn.Sequential(shared), torch.nn.Sequential(shared)])
    model[1].eval()
    before = [module.training for module in model.modules()]
    with in_mode(model, training=True):
        pass
    assert [module.training for module in model.modules()] == before
