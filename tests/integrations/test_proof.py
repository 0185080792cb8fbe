"""What a proof by probe sees, and what it leaves untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastattn.integrations.proof import Draw, Probe, configuration, mismatch
from fastattn.integrations.recogniser import Recogniser


class Scale(torch.nn.Module):
    """y = weight * x, with dropout; the original of these tests."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x * self.weight)


def computing(change: Callable[[Any, torch.Tensor], Any]) -> type[torch.nn.Module]:
    """The replacement whose forward is change(self, x)."""
    return type("Changed", (Scale,), {"forward": change})


Same = type("Same", (Scale,), {})
OffInTraining = computing(lambda m, x: Scale.forward(m, x) * (1.001 if m.training else 1.0))
NotANumber = computing(lambda m, x: Scale.forward(m, x) * float("nan"))


class Raising(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("by design")


def probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
    return [Probe((draw.normal(4, 16),))]


CPU = torch.device("cpu")
KNOWN = Recogniser("Scale", Scale, probes, lambda *_: None)


def disprove(
    replacement: type[torch.nn.Module], original: type[torch.nn.Module] = Scale
) -> str | None:
    found = mismatch(original(), original, replacement, KNOWN, Draw(torch.float32, CPU))
    return found and found.reason


def test_the_same_is_proven() -> None:
    assert disprove(Same) is None


@pytest.mark.parametrize(
    ("replacement", "finding"),
    [
        (lambda m, x: Scale.forward(m, x) + 1e-5, "output 0 is off in eval mode: max error"),
        (
            lambda m, x: Scale.forward(m, x) + 1e-5 * (torch.arange(16) == 5),
            "output 0 is off in eval mode: max error",
        ),
        (OffInTraining, "output 0 is off in train mode"),
        (
            lambda m, x: Scale.forward(m, x * 1.001 - x.detach() * 0.001),
            "the gradient of input 0 is off in eval mode",
        ),
        (
            lambda m, x: x * m.weight.detach(),
            "it returns ['output 0', 'the gradient of input 0', 'output 0 under no_grad']",
        ),
        (lambda m, x: Scale.forward(m, x)[None], "output 0 is off in eval mode: (1, 4, 16)"),
        (
            lambda m, x: Scale.forward(m, x).double(),
            "output 0 is off in eval mode: (4, 16) torch.float64",
        ),
        (NotANumber, "output 0 is off in eval mode: 64 of 64 are NaN"),
        (Raising, "the replacement fails on random input: ZeroDivisionError: by design"),
    ],
    ids=[
        *("slightly", "one element", "in training", "input's gradient", "no weight's gradient"),
        *("shape", "dtype", "not a number", "raising"),
    ],
)
def test_a_difference_is_found(replacement: Any, finding: str) -> None:
    found = disprove(replacement if isinstance(replacement, type) else computing(replacement))
    assert found is not None
    assert found.startswith(finding)


def test_an_original_that_fails_proves_nothing() -> None:
    found = disprove(Same, original=Raising)
    assert found is not None
    assert found.startswith("the original in float64 fails on random input")


def test_an_original_without_numbers_proves_nothing() -> None:
    found = disprove(NotANumber, original=NotANumber)
    assert found is not None
    assert "are NaN" in found


def test_the_measure_is_the_originals_own_error() -> None:
    draw, module = Draw(torch.bfloat16, CPU), Scale().bfloat16()
    # Off by what bfloat16 rounds away anyway, and by no more.
    noisy = computing(lambda m, x: Scale.forward(m, x.float()).to(x.dtype))
    assert mismatch(module, Scale, noisy, KNOWN, draw) is None
    found = mismatch(module, Scale, OffInTraining, KNOWN, draw)
    assert found is None  # 0.1% is less than a rounding in bfloat16


class NoBiasGradient(Scale):
    """A bias that changes nothing, so that its gradient is a sum of terms that cancel."""

    error = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + (self.bias - self.bias.detach()) * self.error + (self.bias - self.bias)


def test_a_gradient_that_is_zero_has_the_scale_of_the_others() -> None:
    def off_by(error: float) -> type[torch.nn.Module]:
        return type("Off", (NoBiasGradient,), {"error": error})

    assert disprove(off_by(1e-8), original=NoBiasGradient) is None
    found = disprove(off_by(1e-4), original=NoBiasGradient)
    assert found is not None
    assert found.startswith("the gradient of bias is off in eval mode")


def test_buffers_keep_their_values_where_they_are_masks() -> None:
    class Masked(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(16).cumsum(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (self.mask > 5)

    class Cut(Masked):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Scale.forward(self, x) * (torch.arange(16) > 4)

    for keeps in (True, False):
        row = dataclasses.replace(KNOWN, keeps_buffers=keeps)
        found = mismatch(Masked(), Masked, Cut, row, Draw(torch.float32, CPU))
        assert (found is None) is keeps


class Linear(torch.nn.Linear):
    steeper = 1.0

    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight * self.steeper, self.bias)


def test_the_callers_autocast_hides_nothing() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = disprove(type("Steeper", (Linear,), {"steeper": 1.0005}), original=Linear)
        assert torch.is_autocast_enabled("cpu")
    assert found is not None
    assert found.startswith("output 0 is off in eval mode: max error")


def test_configurations_differ_by_what_is_computed() -> None:
    norm = torch.nn.LayerNorm(8)
    same = torch.nn.LayerNorm(8).eval()
    same.layer_idx = 3  # type: ignore[assignment]
    assert configuration(norm) == configuration(same)
    for other in (
        torch.nn.LayerNorm(9),
        torch.nn.LayerNorm(8, eps=1e-6),
        torch.nn.LayerNorm(8, bias=False),
        torch.nn.LayerNorm(8, dtype=torch.float64),
        torch.nn.RMSNorm(8),
        torch.nn.Sequential(norm),
    ):
        assert configuration(norm) != configuration(other)


class Product(torch.nn.Module):
    """x * y."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y


class OffForSquares(Product):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y + (1e-3 if x is y else 0.0)


def test_a_tensor_that_is_several_arguments_stays_one() -> None:
    def probes(module: torch.nn.Module, draw: Draw) -> list[Probe]:
        x = draw.normal(4, 16)
        return [Probe((x, x))]

    known = Recogniser("Product", Product, probes, lambda *_: None)
    found = mismatch(Product(), Product, OffForSquares, known, Draw(torch.float32, CPU))
    assert found is not None and found.reason.startswith("output 0 is off")
    assert mismatch(Product(), Product, Product, known, Draw(torch.float32, CPU)) is None


def test_a_function_that_a_module_keeps_is_part_of_its_configuration() -> None:
    class Keeps(torch.nn.Module):
        def __init__(self, function: object) -> None:
            super().__init__()
            self.function = function

    assert configuration(Keeps(torch.relu)) == configuration(Keeps(torch.relu))
    assert configuration(Keeps(torch.relu)) != configuration(Keeps(torch.tanh))


def test_of_several_guesses_the_first_that_the_original_runs() -> None:
    def guesses(module: torch.nn.Module, draw: Draw) -> Iterator[list[Probe]]:
        yield [Probe((draw.normal(4, 15),))]
        yield [Probe((draw.normal(4, 16),), {"mask": None})]
        yield [Probe((draw.normal(4, 16),))]

    def disproved(guesses: Any) -> Any:
        guessing = dataclasses.replace(KNOWN, guesses=guesses)
        return mismatch(Scale(), Scale, Same, guessing, Draw(torch.float32, CPU))

    assert disproved(guesses) is None
    found = disproved(lambda module, draw: iter(()))
    assert found is None  # then the first of all, `probes`
    found = dataclasses.replace(
        KNOWN, guesses=lambda *_: iter(()), probes=lambda *_: [Probe((torch.ones(3),))]
    )
    reason = mismatch(Scale(), Scale, Same, found, Draw(torch.float32, CPU))
    assert reason is not None and "fails on random input" in reason.reason


def test_results_that_do_not_count() -> None:
    class Two(Scale):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), x.sum(-1)

    class OnlyOne(Two):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return super().forward(x)[0], None

    draw = Draw(torch.float32, CPU)
    found = mismatch(Two(), Two, OnlyOne, KNOWN, draw)
    assert found is not None and "it returns" in found.reason
    first = dataclasses.replace(KNOWN, outputs=1)
    assert mismatch(Two(), Two, OnlyOne, first, draw) is None
    assert mismatch(Two(), Two, OffInTraining, first, draw) is not None
