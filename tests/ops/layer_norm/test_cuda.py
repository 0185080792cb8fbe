"""The norms' CUDA C++ kernels: on a GPU if there is one, else in the emulator of csrc/emulator."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from emulator.knobs import Emulator
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
    "float32 weights": Case((6, 768), BF16, residual=BF16),
    "unlike weights": Case((6, 768), BF16, weight=HALF, bias=FLOAT),
    "lower weights": Case((6, 768), FLOAT, weight=BF16, bias=HALF),
    "float32 residual stream": Case((6, 768), BF16, residual=FLOAT),
    "float32 residual stream, float16": Case((3, 1100), HALF, residual=FLOAT),
    "lower residual": Case((6, 100), FLOAT, residual=BF16),
    "float16 and bfloat16": Case((6, 100), HALF, weight=HALF, residual=BF16),
    "bfloat16 by four": alike((6, 100), BF16),
    "mixed, wide": Case((2, 4100), BF16, residual=FLOAT),
    "mixed, longest in one pass": Case((1, 16384), HALF, residual=FLOAT),
    # One by one: rows that are not aligned.
    "odd": Case((5, 7)),
    "one column": Case((5, 1), mean=0.0),
    "odd, float16": alike((33, 7), HALF),
    "odd, bfloat16": alike((3, 1025), BF16),
    "odd, wide": Case((2, 4099), BF16, residual=FLOAT),
    "odd, longest in one pass": alike((1, 8191), HALF),
    # Rows read twice or three times.
    "long": Case((2, 16388), FLOAT, residual=FLOAT, mean=100.0),
    "long, odd": Case((1, 16387), BF16, weight=BF16, bias=BF16, residual=FLOAT),
    # Other things that do not hang on the layout.
    "one dimension": Case((24,)),
    "four dimensions": Case((2, 3, 2, 33)),
    "no weight": Case((6, 100), weight=None, bias=None),
    "no weight, residual": Case((6, 96), HALF, weight=None, bias=None, residual=HALF),
    "no bias": Case((6, 100), HALF, bias=None),
    "bias alone": Case((6, 100), HALF, weight=None),
    "no eps": Case((6, 100), eps=0.0),
    "large eps": Case((6, 100), eps=10.0),
    "large mean": Case((4, 1000), mean=1000.0),
    "large mean, float16": Case((4, 1000), HALF, mean=1000.0),
    "large mean, bfloat16": Case((4, 1024), BF16, mean=100.0),
    "large mean, odd": Case((4, 999), mean=1000.0),
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


@pytest.mark.parametrize("number", range(12))
def test_random_problems(number: int, device: str, emulator: Emulator) -> None:
    r = random.Random(number)
    dtype = r.choice((HALF, BF16, FLOAT))
    leading = [r.randint(1, 6) for _ in range(r.randint(1, 3))]
    hidden = r.choice((r.randint(2, 40), r.randint(2, 3000), 4 * r.randint(1, 500)))
    case = Case(
        shape=(*leading, hidden),
        dtype=dtype,
        center=r.random() < 0.5,
        weight=r.choice((None, dtype, FLOAT)),
        bias=r.choice((None, dtype, FLOAT)),
        residual=r.choice((None, dtype, FLOAT)),
        eps=r.choice((1e-6, 1e-5, 1e-3)),
        mean=r.choice((0.0, 3.0)),
        device=device,
        seed=number,
    )
    emulator.seed(number)
    check(case, "cuda")


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
    results = []
    for number in range(3):
        emulator.seed(number)
        results.append(outputs_and_gradients(case.ours("cuda"), inputs, cotangents))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


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


def test_any_strides(device: str) -> None:
    case = Case((4, 6, 24), residual=FLOAT, device=device)
    inputs = case.inputs()
    wide = torch.randn(4, 6, 3, 24, device=device)
    for x in (
        wide[:, :, 1],  # a slice of a joint projection: rows evenly spaced
        torch.randn(4, 6, 25, device=device)[..., :24],  # evenly spaced, not aligned
        wide[:, 2:3, 0].expand(4, 6, 24),  # a row for every position
        inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),  # rows not evenly spaced
        torch.randn(4, 6, 48, device=device)[..., ::2],  # last dimension strided
        torch.randn(24, device=device).expand(4, 6, 24),  # one row, stride 0
        torch.randn(4, 6, 1, device=device).expand(4, 6, 24),  # last dimension expanded
    ):
        check(case, "cuda", inputs | {"x": x})
        check(case, "cuda", inputs | {"residual": x})
    check(case, "cuda", inputs | {"weight": torch.randn(48, device=device)[::2]})
    check(case, "cuda", inputs | {"weight": torch.randn(1, device=device).expand(24)})


def test_evenly_spaced_rows_are_read_in_place() -> None:
    x = torch.randn(4, 6, 3, 24)[:, :, 1]
    rows = cuda._as_rows(x)
    assert rows.data_ptr() == x.data_ptr()
    assert rows.stride() == (72, 1)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0,), (0, 0)])
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_empty(center: bool, shape: tuple[int, ...], device: str) -> None:
    """Nothing in, nothing out; the weights' gradients are zeros, not garbage."""
    case = Case(shape, center=center, residual=FLOAT, device=device)
    inputs = case.inputs()
    cotangents = [torch.ones(shape, device=device)] * 2
    ours = outputs_and_gradients(case.ours("cuda"), inputs, cotangents)
    expected = outputs_and_gradients(case.eager, inputs, cotangents)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_constant_rows(device: str) -> None:
    """No variance: the output is the bias, and the gradient is that of the formula."""
    x = torch.full((3, 48), 7.25, device=device, requires_grad=True)
    weight, bias = torch.randn(2, 48, device=device)
    out = fastattn.layer_norm(x, weight, bias, backend="cuda")
    torch.testing.assert_close(out, bias.expand(3, 48), rtol=0, atol=0)
    dout = torch.randn(3, 48, device=device)
    (dx,) = torch.autograd.grad(out, x, dout)
    g = dout * weight
    torch.testing.assert_close(dx, (g - g.mean(-1, keepdim=True)) / 1e-5**0.5)


def test_default_eps(device: str) -> None:
    for dtype in (FLOAT, HALF, BF16):
        x = torch.full((2, 8), 3e-4, dtype=dtype, device=device)
        ours = fastattn.rms_norm(x, backend="cuda")
        torch.testing.assert_close(ours, F.rms_norm(x, (8,)))
        assert ours.max() < 0.9  # it is 1 without eps


@pytest.mark.parametrize("hidden", (40, 264))
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_a_bad_row_stays_alone(center: bool, hidden: int, device: str) -> None:
    """NaN or Inf in a row leave the rows beside it, in the same warp, as they were."""
    inputs = dataclasses.replace(alike((6, hidden), FLOAT, False), device=device).inputs()
    norm = Case((6, hidden), center=center).ours("cuda")
    if not center:
        del inputs["bias"]
    x = inputs["x"].requires_grad_()
    clean = norm(**inputs)
    assert isinstance(clean, torch.Tensor)
    (clean_grad,) = torch.autograd.grad(clean.square().sum(), x)
    bad = x.detach().clone()
    bad[1, 3], bad[4, 0] = float("nan"), float("inf")
    bad.requires_grad_()
    out = norm(**(inputs | {"x": bad}))
    assert isinstance(out, torch.Tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), bad)
    good = [0, 2, 3, 5]
    assert torch.equal(out[good], clean[good])
    assert torch.equal(grad[good], clean_grad[good])
    assert out[1].isnan().all()
    assert out[4].isnan().any()


@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("hidden", (40, 16388))
def test_the_sum_that_is_normalised_is_the_one_returned(
    hidden: int, dtype: torch.dtype, device: str
) -> None:
    """Rounded to its dtype first: normalising the returned sum again gives the same bits."""
    x, residual = torch.randn(2, 2, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, device=device)
    out, stream = fastattn.layer_norm(x, weight, residual=residual, backend="cuda")
    assert torch.equal(stream, x + residual)
    assert torch.equal(out, fastattn.layer_norm(stream, weight, backend="cuda"))


@pytest.mark.parametrize("hidden", (40, 1032))
def test_a_row_does_not_depend_on_its_batch(hidden: int, device: str) -> None:
    x = torch.randn(7, hidden, device=device)
    weight = torch.randn(hidden, device=device)
    together = fastattn.layer_norm(x, weight, backend="cuda")
    for i in range(7):
        assert torch.equal(fastattn.layer_norm(x[i], weight, backend="cuda"), together[i])


@pytest.mark.parametrize("hidden", (24, 8200))
@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("x",), ("residual", "bias")])
def test_gradients_of_some_inputs_alone(wanted: tuple[str, ...], hidden: int, device: str) -> None:
    case = Case((3, hidden), residual=FLOAT, device=device)
    inputs = case.inputs()
    dout = torch.randn(3, hidden, device=device)

    def grads(backend: str) -> tuple[torch.Tensor, ...]:
        leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in inputs.items()}
        out, _ = case.ours(backend)(**leaves)
        return torch.autograd.grad(out, [leaves[n] for n in wanted], dout)

    torch.testing.assert_close(grads("cuda"), grads("reference"))


@pytest.mark.parametrize("used", (0, 1), ids=("out", "stream"))
def test_gradients_through_one_output_alone(used: int, device: str) -> None:
    case = Case((4, 24), BF16, residual=FLOAT, device=device)
    inputs = case.inputs()
    cotangent = torch.randn(4, 24, device=device)

    def grads(backend: str) -> tuple[torch.Tensor | None, ...]:
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        return torch.autograd.grad(
            case.ours(backend)(**leaves)[used], list(leaves.values()), cotangent, allow_unused=True
        )

    for ours, expected in zip(grads("cuda"), grads("reference"), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            torch.testing.assert_close(ours, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("hidden", (33, 64))
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_output_in_float32(center: bool, hidden: int, device: str) -> None:
    """What autocast asks of the kernels on a GPU: 16 bits in, float32 out, and back."""
    x = torch.randn(5, hidden, device=device).to(BF16).requires_grad_()
    weight = torch.randn(hidden, device=device).requires_grad_()
    dout = torch.randn(5, hidden, device=device)
    out, _, _ = torch.ops.fastattn.layer_norm(
        x, None, weight, None, 1e-5, center, FLOAT, "cuda", True
    )
    assert out.dtype == FLOAT
    norm = F.layer_norm if center else F.rms_norm
    expected = norm(x.float(), (hidden,), weight, eps=1e-5)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out, (x, weight), dout)
    assert [grad.dtype for grad in ours] == [BF16, FLOAT]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (x, weight), dout))


def test_second_derivative(device: str) -> None:
    """The backward's own backward is the reference's, whatever ran the first two."""
    x = torch.randn(3, 24, device=device, requires_grad=True)
    weight = torch.randn(24, device=device, requires_grad=True)

    def twice(backend: str) -> tuple[torch.Tensor, ...]:
        out = fastattn.rms_norm(x, weight, backend=backend)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    torch.testing.assert_close(twice("cuda"), twice("reference"))


def test_what_is_not_supported() -> None:
    def reason(x: torch.Tensor, **arguments: torch.Tensor) -> str | None:
        return cuda.unsupported(describe_layer_norm(x, **arguments))

    x = torch.empty(2, 24, device="meta")
    assert reason(x) is None
    assert reason(x.double()) == "the kernels compute in float32: float64 would lose precision"
    assert reason(x, weight=torch.empty(24, device="meta", dtype=DOUBLE)) is not None
    far = torch.empty(1, 2**30 + 1, device="meta")
    assert reason(far) == f"the kernels take hidden sizes up to {2**30}; got {2**30 + 1}"


def test_blocks_of_sums_have_rows() -> None:
    """None is empty, for the sums' bits are those of the shape and not of the GPU."""
    for hidden in (1, 7, 64, 768, 1024, 4096, 8192, 8193, 16384, 400_000):
        for rows in (1, 2, 5, 100, 8192, 10**6):
            assert 1 <= cuda.sum_blocks(rows, hidden) <= min(rows, 324)
