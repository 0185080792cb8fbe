"""The norms' CUDA C++ kernels: on a GPU if there is one, else in the emulator of csrc/emulator."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulator.knobs import Emulator
from ops import laws
from ops.layer_norm.cases import Case, check, outputs_and_gradients

import fastattn
from fastattn.ops.layer_norm import cuda
from fastattn.ops.layer_norm.problem import describe_layer_norm
from oracle import assert_close_to_reference

# torch's own rms_norm says that mixed dtypes are not fused.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
    pytest.mark.usefixtures("emulator"),
]

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def alike(shape: tuple[int, ...], dtype: torch.dtype, residual: bool = True) -> Case:
    return Case(shape, dtype, True, dtype, dtype, dtype if residual else None)


# For every kernel and layout of rows on threads that csrc/layer_norm/*.cu chooses.
CASES = {
    # Streams of one dtype: 16 bytes at a time.
    "a lane a row": alike((300, 8), HALF),  # 128 rows a block, the last ones beyond the end
    "part of a warp": alike((70, 64), BF16),
    "a third of a power of two": alike((33, 24), FLOAT),
    "a warp": alike((9, 256), HALF),
    "two vectors a lane": alike((9, 512), BF16),
    "GPT-2": alike((9, 768), BF16),
    "GPT-2, float16": alike((9, 768), HALF),
    "GPT-2, float32": alike((6, 768), FLOAT),
    "three vectors, not all": alike((5, 520), HALF),
    "four vectors a lane": alike((6, 1024), HALF),  # backward: two warps a row, four rows at once
    "two rows a block": alike((5, 1536), BF16),
    "a block a row": alike((3, 4096), BF16),
    "a block a row, float32": alike((3, 2560), FLOAT),
    "longest with sums": alike((2, 8192), HALF),
    "longest with sums, float32": alike((2, 8192), FLOAT),
    "longest": alike((2, 16384), BF16),
    "longest, float32": alike((1, 16384), FLOAT),
    "more rows than blocks": Case((460, 8), HALF, weight=HALF, bias=HALF),
    "many steps": alike((900, 264), BF16, residual=False),
    # Mixtures: 4 elements at a time.
    "unlike weights": Case((6, 768), BF16, weight=HALF, bias=FLOAT),
    "float32 residual stream": Case((6, 768), BF16, residual=FLOAT),
    "float32 residual stream, float16": Case((3, 1100), HALF, residual=FLOAT),
    "mixed, wide": Case((2, 4100), BF16, residual=FLOAT),
    "mixed, longest in one pass": Case((1, 16384), HALF, residual=FLOAT),
    # One by one: rows that are not aligned.
    "one column": Case((5, 1), mean=0.0),
    "odd, float16": alike((33, 7), HALF),
    "odd, bfloat16": alike((3, 1025), BF16),
    "odd, wide": Case((2, 4099), BF16, residual=FLOAT),
    "odd, longest in one pass": alike((1, 8191), HALF),
    # Rows read twice or three times.
    "long": Case((2, 16388), FLOAT, residual=FLOAT, mean=100.0),
    "long, odd": Case((1, 16387), BF16, weight=BF16, bias=BF16, residual=FLOAT),
    "odd, large mean": Case((4, 999), mean=1000.0),
}


@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, center: bool, device: str, emulator: Emulator) -> None:
    case = CASES[name]
    if case.shape[-1] == 1 and not center:
        pytest.skip("rms_norm of one element is +-1: its gradient is nothing but rounding")
    emulator.seed(len(name) + center)
    check(dataclasses.replace(case, center=center, device=device), "cuda")


@pytest.mark.parametrize("hidden", (1028, 2056, 20000))
@pytest.mark.parametrize("deviation", (1e-3, 0.0))
def test_a_mean_far_above_the_deviations(hidden: int, deviation: float, device: str) -> None:
    """The mean's own rounding is no small part of them."""
    x = 100.0 + deviation * torch.randn(3, hidden, device=device)
    x[1] = -1234.56
    ours, eager, exact = (
        fastattn.layer_norm(x, backend="cuda"),
        F.layer_norm(x, (hidden,)),
        F.layer_norm(x.double(), (hidden,)),
    )
    assert_close_to_reference(ours, eager, exact, terms=1.0)


# What has a second way of being wrong: barriers and shared memory, one warp, the second stage.
REPEATED = {
    "part of a warp": alike((70, 64), BF16),
    "two warps a row": alike((12, 1024), HALF),
    "a block a row": Case((5, 2052), FLOAT, residual=BF16),
    "sums apart": alike((40, 8200), BF16),
    "long": Case((2, 16388), FLOAT),
}


@pytest.mark.parametrize("name", REPEATED)
def test_same_inputs_same_bits(name: str, device: str, emulator: Emulator) -> None:
    """Whatever the order in which threads and blocks run."""
    case = dataclasses.replace(REPEATED[name], device=device)
    inputs = case.inputs()
    cotangents = [torch.randn(case.shape, device=device) for _ in range(2)]
    laws.same_bits(
        lambda: outputs_and_gradients(case.ours("cuda"), inputs, cotangents), 3, emulator.seed
    )


def aligned_to(elements: int, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` that begins `elements` elements after an aligned address."""
    place = tensor.new_empty(tensor.numel() + elements)[elements:].view(tensor.shape)
    return place.copy_(tensor)


@pytest.mark.parametrize("dtype", (HALF, FLOAT))
@pytest.mark.parametrize("elements", (1, 4))
@pytest.mark.parametrize("which", ("x", "residual", "weight", "bias"))
def test_misaligned(which: str, elements: int, dtype: torch.dtype, device: str) -> None:
    case = dataclasses.replace(alike((3, 264), dtype), device=device)
    inputs = case.inputs()
    check(case, "cuda", inputs | {which: aligned_to(elements, inputs[which])})


def test_misaligned_gradient(device: str) -> None:
    case = dataclasses.replace(alike((3, 264), HALF, residual=False), device=device)
    leaves = {name: x.requires_grad_() for name, x in case.inputs().items()}
    dout = torch.randn(3, 264, device=device).half()
    out = case.ours("cuda")(**leaves)
    assert isinstance(out, torch.Tensor)
    aligned = torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)
    for elements in (1, 4):
        other = torch.autograd.grad(out, list(leaves.values()), aligned_to(elements, dout))
        torch.testing.assert_close(other, aligned)
        out = case.ours("cuda")(**leaves)
        assert isinstance(out, torch.Tensor)


def test_what_is_not_supported() -> None:
    def reason(x: torch.Tensor, **arguments: Any) -> str | None:
        return cuda.unsupported(describe_layer_norm(x, **arguments))

    x = torch.empty(2, 24, device="meta")
    assert reason(x) is None
    assert reason(x.double()) == "the kernels compute in float32: float64 would lose precision"
    assert reason(x, weight=torch.empty(24, device="meta", dtype=DOUBLE)) is not None
    dropping = reason(x, residual=x, dropout_p=0.5)
    assert dropping == "the CUDA kernels of the norms have no dropout"
    far = torch.empty(1, 2**30 + 1, device="meta")
    assert reason(far) == f"the kernels take hidden sizes up to {2**30}; got {2**30 + 1}"


def test_blocks_of_sums_have_rows() -> None:
    """None is empty, for the sums' bits are those of the shape and not of the GPU."""
    for hidden in (1, 7, 64, 768, 1024, 4096, 8192, 8193, 16384, 400_000):
        for rows in (1, 2, 5, 100, 8192, 10**6):
            assert 1 <= cuda.sum_blocks(rows, hidden) <= min(rows, 324)
