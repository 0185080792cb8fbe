"""The `cuda` backend of ffn; without a GPU its kernels run in the emulator."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.knobs import Emulator
from ops import laws
from ops.ffn.cases import ACTIVATIONS, Case, check, output_and_gradients

import fastattn
from fastattn.ops.ffn import cuda

HALF, BF16 = torch.float16, torch.bfloat16
LAYOUTS = ("linear", "conv1d")
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("emulator")
in_the_emulator = pytest.mark.skipif(GPU, reason="asks the emulator")


@pytest.fixture(autouse=True)
def _no_cublaslt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are our kernels'; on a GPU the tests of all backends have cuBLASLt's."""
    monkeypatch.setattr(cuda, "cublaslt_version", lambda: 0)


# Tiles of csrc/ffn/product.cuh; the emulator has 4 multiprocessors: for as many large tiles.
TILES = {
    "by the element, several tiles": Case((70, 67), 75, 41),
    "out by the element": Case((17, 24), 40, 13),  # of Linear's weights rows are aligned
    "small tiles, masked": Case((70, 72), 80, 24),
    "small tiles, whole": Case((64, 64), 128, 64),
    "small tiles, deep": Case((16, 328), 24, 16),  # the ring goes round
    "large tiles, masked": Case((200, 40), 136, 24),
    "large tiles, whole": Case((256, 64), 256, 32),
    "large tiles, deep": Case((260, 136), 136, 8),
    "two groups of rows of tiles": Case((580, 8), 16, 8),
}


@pytest.mark.parametrize("dtype", (HALF, pytest.param(BF16, marks=pytest.mark.long)))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TILES)
def test_tiles(name: str, layout: str, dtype: torch.dtype, device: str) -> None:
    check(dataclasses.replace(TILES[name], layout=layout, dtype=dtype, device=device), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_enough_tokens_for_a_gpu(layout: str, dtype: torch.dtype) -> None:
    """Large tiles, whole and masked, and all multiprocessors at once."""
    check(Case((8192, 768), 3072, 768, dtype, layout=layout, device="cuda"), "cuda")
    check(Case((8000, 776), 3080, 392, dtype, layout=layout, device="cuda"), "cuda")


def test_no_gate(device: str) -> None:
    """It is refused, and another backend takes the call."""
    case = Case((5, 16), 24, 8, HALF, gated=True, device=device)
    with pytest.raises(fastattn.UnsupportedError, match="the CUDA kernels have no gate"):
        case.ours("cuda")(**case.inputs())
    check(case, None)


# --- bits -----------------------------------------------------------------------------------------


@in_the_emulator
@pytest.mark.parametrize(
    "case", ("small tiles, masked", "large tiles, masked", "by the element, several tiles")
)
def test_the_schedule_has_no_effect(case: str, emulator: Emulator) -> None:
    problem = dataclasses.replace(TILES[case], dtype=BF16)
    inputs = problem.inputs()
    cotangent = torch.randn(*problem.shape[:-1], problem.out_features).to(BF16)
    run = problem.ours("cuda")
    laws.same_bits(lambda: output_and_gradients(run, inputs, cotangent), 4, emulator.seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_does_not_depend_on_the_others(layout: str, device: str) -> None:
    """Nor on the tile that their number chooses."""
    case = Case((300, 72), 136, 40, HALF, layout=layout, device=device)
    inputs = case.inputs()
    cotangent = torch.randn(300, 40, device=device).half()
    whole = output_and_gradients(case.ours("cuda"), inputs, cotangent)
    some = inputs | {"x": inputs["x"][130:133]}
    part = output_and_gradients(case.ours("cuda"), some, cotangent[130:133])
    for name in ("out", "dx"):
        assert torch.equal(part[name], whole[name][130:133]), name


def test_column_sums(device: str) -> None:
    """Both stages, and the sums of so many tokens that there is one more."""
    for rows, width, dtype in (
        (1100, 24, torch.float32),
        (1100, 9, torch.float32),
        (600, 300, HALF),
    ):
        matrix = torch.randn(rows, width, device=device).to(dtype)
        for result in (HALF, BF16):
            sums = cuda._column_sums(matrix, result)
            exact = matrix.double().sum(0)
            torch.testing.assert_close(sums.double(), exact, rtol=8e-3, atol=1e-3)


# --- work -----------------------------------------------------------------------------------------


@in_the_emulator
@pytest.mark.parametrize(
    "case", ("small tiles, whole", "large tiles, whole", "large tiles, masked")
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bank_conflicts(layout: str, case: str, emulator: Emulator) -> None:
    """All orders of the operands: x w, x^T y and the rest, with what follows the product."""
    problem = dataclasses.replace(TILES[case], dtype=HALF, layout=layout)
    counted = emulator.counts(lambda: check(problem, "cuda"))
    assert set(counted) == {"ffn_forward", "ffn_backward", "ffn_column_sums"}
    for kernel, of in counted.items():
        assert of["shared_accesses"] > 0
        assert of["bank_conflicts"] == 0, kernel


@in_the_emulator
@pytest.mark.parametrize(
    ("wanted", "recompute", "launches"),
    [
        (("x",), False, {"ffn_forward": 3, "ffn_backward": 1}),
        (("x",), True, {"ffn_forward": 4, "ffn_backward": 1}),
        (("b1",), False, {"ffn_forward": 2, "ffn_backward": 1, "ffn_column_sums": 1}),
        (("b2",), True, {"ffn_forward": 2, "ffn_column_sums": 2}),
        (("w1", "w2"), False, {"ffn_forward": 4, "ffn_backward": 1}),
    ],
)
def test_what_is_frozen_costs_nothing(
    wanted: tuple[str, ...], recompute: bool, launches: dict[str, int], emulator: Emulator
) -> None:
    case = Case((66, 24), 40, 16, HALF, recompute=recompute)
    leaves = {n: x.requires_grad_(n in wanted) for n, x in case.inputs().items()}
    run = case.ours("cuda")
    counted = emulator.counts(
        lambda: torch.autograd.grad(run(**leaves).sum(), [leaves[name] for name in wanted]),
    )
    assert {kernel: of["launches"] for kernel, of in counted.items()} == launches


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backwards_and_forwards_of_other_backends(activation: str, device: str) -> None:
    """What the forward keeps is the same for all."""
    from fastattn.ops.ffn import triton

    case = Case((20, 24), 40, 16, HALF, activation, device=device)
    inputs = case.inputs()
    tensors = [inputs.get(name) for name in ("x", "w1", "b1", "w2", "b2", "gate", "gate_bias")]
    options = activation, "linear"
    dout, needs = torch.randn(20, 16, device=device).half(), [t is not None for t in tensors]
    results = []
    for first, second in itertools.product((cuda, triton), repeat=2):
        _, pre = first.forward(*tensors, *options, True)
        results.append(second.backward(dout, *tensors, pre, needs, *options))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


# --- cuBLASLt -------------------------------------------------------------------------------------

# cublasLtEpilogue_t, as the documentation of cuBLAS lists it.
DEFAULT, BIAS, RELU_BIAS, GELU_BIAS = 1, 4, 6, 36
GELU_AUX, GELU_AUX_BIAS, DGELU, DGELU_BGRAD = 160, 164, 192, 208


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fake cuBLASLt was told, and whose results were held to the numeric rule."""
    sources = Path(__file__).parent / "cublaslt"
    folder = tmp_path_factory.mktemp("cublaslt")
    for name in ("fake", "preload"):
        command = ["g++", "-std=c++17", "-O2", "-Wall", "-fPIC", "-shared"]
        source, library = sources / f"{name}.cpp", folder / f"{name}.so"
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    fakes = {"FAKE_CUBLASLT": str(folder / "fake.so"), "LD_PRELOAD": str(folder / "preload.so")}
    run = subprocess.run(
        [sys.executable, str(sources / "program.py")],
        env=os.environ | {"PYTHONPATH": path} | fakes,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def epilogues(calls: list[dict[str, Any]]) -> list[int]:
    return [call["epilogue"] for call in calls]


@in_the_emulator
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_cublaslt_is_told(layout: str, dtype: str, told: dict[str, Any]) -> None:
    """(3, 6, 24) to 40 to 16: column-major, so (features, tokens) = weight times (k, tokens)."""
    linear = layout == "linear"

    def call(
        epilogue: int, sizes: tuple[int, int, int], transposed: tuple[int, int], *ld: int
    ) -> dict[str, Any]:
        rows, columns, depth = sizes
        return {
            "epilogue": epilogue,
            "rows": rows,
            "columns": columns,
            "depth": depth,
            "transposed": list(transposed),
            "ld": list(ld),
        }

    into, back = ((1, 0), (0, 0)) if linear else ((0, 0), (1, 0))
    assert told[f"{layout} {dtype}"] == [
        call(GELU_AUX_BIAS, (40, 18, 24), into, 24 if linear else 40, 24, 40),
        call(BIAS, (16, 18, 40), into, 40 if linear else 16, 40, 16),
        call(DGELU_BGRAD, (40, 18, 16), back, 40 if linear else 16, 16, 40),
        call(DEFAULT, (24, 18, 40), back, 24 if linear else 40, 40, 24),  # dx
        *(
            (
                call(DEFAULT, (24, 40, 18), (0, 1), 24, 40, 24),  # dw1 (40, 24)
                call(DEFAULT, (40, 16, 18), (0, 1), 40, 16, 40),  # dw2 (16, 40)
            )
            if linear
            else (
                call(DEFAULT, (40, 24, 18), (0, 1), 40, 24, 40),  # dw1 (24, 40)
                call(DEFAULT, (16, 40, 18), (0, 1), 16, 40, 16),  # dw2 (40, 16)
            )
        ),
    ]


@in_the_emulator
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("no bias", [GELU_AUX, DEFAULT, DGELU, *[DEFAULT] * 3]),
        ("recompute", [GELU_BIAS, BIAS, BIAS, DGELU_BGRAD, *[DEFAULT] * 3]),
        ("inference", [GELU_BIAS, BIAS]),
        ("relu", [RELU_BIAS, BIAS, *[DEFAULT] * 3]),  # its derivative is our kernel's
        ("gelu", [BIAS, *[DEFAULT] * 3]),  # cuBLASLt has no erf
        ("odd hidden", []),  # rows are not aligned
        ("no tokens", []),
        ("strided x", [GELU_AUX_BIAS, BIAS, DGELU_BGRAD, *[DEFAULT] * 3]),
        ("transposed weights", [GELU_AUX_BIAS, BIAS, DGELU_BGRAD, *[DEFAULT] * 3]),
        ("strided bias", [BIAS, DGELU_BGRAD, *[DEFAULT] * 3]),
        ("activation is ours", [BIAS]),
        ("activation is ours above", [GELU_BIAS, BIAS]),
    ],
)
def test_what_cublaslt_does(call: str, expected: list[int], told: dict[str, Any]) -> None:
    assert epilogues(told[call]) == expected


@in_the_emulator
def test_cublaslt_is_asked_once_and_its_errors_are_raised(told: dict[str, Any]) -> None:
    assert told["version"] == 130101
    assert told["heuristics of three equal products"] == 1
    assert told["descriptors left alive"] == 0
    assert told["error of a product"] == (
        "fastattn: cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED, for out (18, 40) = a (18, 24) "
        "b (24, 40) in float16, epilogue GELU_AUX_BIAS"
    )
    assert told["error of a heuristic"] == (
        "fastattn: cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_INVALID_VALUE, for out (5, 40) = "
        "a (5, 24) b (24, 40) in float16, epilogue GELU_BIAS"
    )


@in_the_emulator
@pytest.mark.parametrize("answer", ("finds nothing", "supports nothing"))
def test_without_an_algorithm_the_products_are_ours(answer: str, told: dict[str, Any]) -> None:
    """`check` held them to the numeric rule; three equal products were asked about once."""
    assert told[answer] == []
    assert told[f"{answer}, asked"] == [[False] * 3, 1]
