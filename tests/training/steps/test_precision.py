"""Number formats: autocast, and float16's scaled loss that overflows and recovers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from training.small import (
    HELD_OUT,
    OBJECTIVE,
    model,
    same,
    stopping,
    trained,
    weights,
    windows,
    with_changes,
)

from fastattn.training import Checkpoints, train


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_it_learns_under_autocast_with_weights_in_float32(precision: str) -> None:
    subject = model()
    seen = []
    subject.register_forward_pre_hook(
        lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    )
    history = trained(subject, with_changes(steps=40, precision=precision))
    assert set(seen) == {(True, getattr(torch, precision))}
    assert history.evaluations[-1].loss < 0.5
    assert {parameter.dtype for parameter in subject.parameters()} == {torch.float32}


def _overflowing(subject: torch.nn.Module, steps: int) -> None:
    """The first `steps` gradients of one parameter are infinite."""
    left = iter(range(steps))
    subject.norm_f.bias.register_hook(
        lambda gradient: gradient if next(left, None) is None else gradient + math.inf
    )


def test_a_step_of_float16_that_overflows_is_left_out_and_the_scale_halves(tmp_path: Path) -> None:
    """Also across a stop: the scale goes on where it was."""
    config = with_changes(steps=5, precision="float16", warmup_steps=0)
    whole, start = model(), weights(model())
    _overflowing(whole, steps=3)
    unchanged: list[bool] = []
    history = train(
        whole, OBJECTIVE, windows(), config,
        on_progress=lambda h: unchanged.append(same(weights(whole), start)),
    )  # fmt: skip
    norms = [step.gradient_norm for step in history.steps]
    assert [math.isinf(norm) for norm in norms] == unchanged == [True, True, True, False, False]

    parted, again = model(), model(seed=1)
    _overflowing(parted, steps=2)
    _overflowing(again, steps=1)
    folder = Checkpoints(tmp_path)
    train(parted, OBJECTIVE, windows(), config, checkpoints=folder, on_progress=stopping(2))
    assert train(again, OBJECTIVE, windows(), config, checkpoints=folder) == history
    assert same(weights(again), weights(whole))
    scalars = json.loads((folder.path(5) / "state.json").read_text())
    assert scalars["scaler"]["scale"] == 65536 / 2**3


def test_float16_stops_where_no_scale_is_small_enough() -> None:
    subject = model()
    before = weights(subject)
    _overflowing(subject, steps=99)
    with pytest.raises(FloatingPointError, match=r"step 17: loss .*, gradient norm (inf|nan), in"):
        trained(subject, with_changes(precision="float16"), validation=windows(HELD_OUT))
    assert same(before, weights(subject))
