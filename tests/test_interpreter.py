"""Triton's interpreter, as interpreter.py hastens it: both savings are made in this Triton."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.backends import triton_runs

pytestmark = pytest.mark.skipif(
    triton_runs() != "interpreted", reason="kernels are not interpreted"
)


def test_integers_are_not_computed_twice() -> None:
    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.sanitize_overflow
    assert not interpreter_builder.options.debug  # else the assertion would be made, and is missed


def test_programs_do_not_patch_the_language_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch whose programs are four times as many, each calling functions, patches as often."""
    from triton.runtime import interpreter

    patches: list[object] = []
    patch = interpreter._patch_lang_tensor
    monkeypatch.setattr(
        interpreter, "_patch_lang_tensor", lambda *args: patches.append(None) or patch(*args)
    )

    def counted(rows: int) -> int:
        patches.clear()
        x, weight, bias = torch.randn(rows, 24), torch.ones(24), torch.zeros(24)
        fastattn.layer_norm(x, weight, bias, backend="triton")
        return len(patches)

    counted(100)  # loads the kernels
    assert counted(100) == counted(400) >= 1
