"""Faults planted into the norms' kernels are found where their IR is executed (ir.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastattn.backends import triton_runs
from fastattn.ops.layer_norm import triton as kernels

pytestmark = pytest.mark.skipif(
    triton_runs() != "executed", reason="the IR is not executed here: pytest --triton ir says why"
)

ROWS, HIDDEN = 150, 40  # several programs; 24 lanes of a tile are beyond a row


def with_fault(right: str, wrong: str, folder: Path) -> ModuleType:
    """The kernels' module with the first `right` of its source replaced."""
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    assert right in source
    path = folder / "faulty.py"  # a file, which Triton reads the kernels from
    path.write_text(source.replace(right, wrong, 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(module: ModuleType) -> Any:
    """dx, dweight and dbias of layer_norm by the module's forward and backward."""
    x, dout, weight = torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN), torch.randn(HIDDEN)
    _, _, statistics = module.forward(x, None, weight, weight, 1e-5, True, x.dtype)
    dx, _, *sums = module.backward(
        dout, None, x, weight, statistics, True, x.dtype, None, x.dtype, True
    )
    return dx, *sums


# What is written, what is written instead, and what the failed launch says.
FAULTS = {
    "a load without its mask": (
        "row * x_stride + column, mask=mask, other=0.0)",
        "row * x_stride + column)",
        r"tl\.load\(x_ptr .* reads \d+ element\(s\) past the end of the tensor passed as `x_ptr`",
    ),
    "a store without its mask": (  # of rstd, which means follow
        "tl.store(statistics_ptr + row, rstd, mask=present)",
        "tl.store(statistics_ptr + row, rstd)",
        r"tl\.store\(statistics_ptr .* both touch element 150 of `statistics_ptr`",
    ),
    "a wrong stride": (
        "out_offset = row * HIDDEN + column",
        "out_offset = row * (HIDDEN + 1) + column",
        r"tl\.store\(out_ptr .* writes \d+ element\(s\) past the end of the tensor passed as `out_ptr`",
    ),
    "two programs write one element": (
        "partials_ptr += program * HIDDEN",
        "partials_ptr += 0 * HIDDEN",
        r"tl\.store\(partials_ptr .* both touch element 0 of `partials_ptr`",
    ),
    "two lanes write one element": (
        "out_offset = row * HIDDEN + column",
        "out_offset = row * 0 + column",
        r"tl\.store\(out_ptr .* two lanes of one store",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    from ttsem.sanitize import KernelFault

    right, wrong, found = FAULTS[name]
    with pytest.raises(KernelFault, match=rf"faulty\.py:\d+: .*{found}"):
        gradients(with_fault(right, wrong, tmp_path))


def test_memory_that_nobody_wrote_is_nan(tmp_path: Path) -> None:
    """Here the statistics, which the backward reads."""
    stored = "    tl.store(statistics_ptr + row, rstd, mask=present)\n"
    dx, *_ = gradients(with_fault(stored, "", tmp_path))
    assert dx.isnan().all()


def test_the_kernels_without_a_fault_pass() -> None:
    assert all(x.isfinite().all() for x in gradients(kernels))


def test_a_launch_too_large_to_be_checked_for_races_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from ttsem import memory

    monkeypatch.setattr(memory, "ACCESS_BUDGET", 100)
    monkeypatch.setattr(memory, "SPAN_BUDGET", 1)
    with pytest.raises(AssertionError, match="too large to be checked"):
        gradients(kernels)
