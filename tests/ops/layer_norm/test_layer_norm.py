"""The norms on every backend against float64."""

from __future__ import annotations

import dataclasses
import importlib
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import laws
from ops.backends import BACKENDS
from ops.layer_norm.cases import Case, check, outputs_and_gradients

import fastattn
from fastattn.backends import triton_runs
from fastattn.ops.common import launch
from fastattn.ops.layer_norm import tiles

# torch's own rms_norm says that mixed dtypes are not fused.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

KERNELS = ("triton", "cuda")
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Each case has its reason. The kernels' tile of 2048 elements holds 2048 / 2^n rows.
CASES = {
    "odd": Case((5, 7)),  # 7 of 8 columns, 5 of 256 rows
    "one dimension": Case((24,)),  # a single row
    "four dimensions": Case((2, 3, 2, 33)),
    "full tile": Case((32, 64)),  # no masked element
    "one row more": Case((33, 64)),
    "GPT-2": Case((9, 768), residual=FLOAT),
    "one row a tile": Case((3, 2049)),
    "more rows than a program takes": Case((150, 600)),  # backward: the persistent loop goes round
    "float16": Case((6, 100), HALF, weight=HALF, bias=HALF, residual=HALF),
    "bfloat16": Case((6, 100), BF16, weight=BF16, bias=BF16, residual=BF16),
    "float32 weights": Case((6, 100), BF16, residual=BF16),
    "float32 weight, no bias": Case((6, 100), HALF, bias=None),
    "float32 bias, no weight": Case((6, 100), HALF, weight=None),
    "unlike weights": Case((6, 100), BF16, weight=HALF, bias=FLOAT),
    "lower weights": Case((6, 100), FLOAT, weight=BF16, bias=HALF),
    "float32 residual stream": Case((6, 100), BF16, residual=FLOAT),  # dx and dresidual differ
    "lower residual": Case((6, 100), FLOAT, residual=BF16),
    "float16 and bfloat16": Case((6, 100), HALF, weight=HALF, residual=BF16),  # meet in float32
    "no weight": Case((6, 100), weight=None, bias=None),
    "no weight, residual": Case((6, 100), weight=None, bias=None, residual=FLOAT),
    "no eps": Case((6, 100), eps=0.0),
    "large eps": Case((6, 100), eps=10.0),
    "large mean": Case((4, 1000), mean=1000.0),  # E[s^2] - E[s]^2 would lose the variance
    "large mean, float16": Case((4, 1000), HALF, mean=1000.0),
    "dropout, one column": Case(
        (6, 1), residual=FLOAT, dropout_p=0.5
    ),  # of a block of four random words
    "dropout, two columns": Case((6, 2), residual=FLOAT, dropout_p=0.5),
    "dropout, odd": Case((5, 7), residual=FLOAT, dropout_p=0.25),
    "dropout, one dimension": Case((24,), residual=FLOAT, dropout_p=0.25),
    "dropout, four dimensions": Case((2, 3, 2, 33), residual=FLOAT, dropout_p=0.9),
    "dropout, several rows a tile": Case((33, 64), residual=FLOAT, dropout_p=0.1),
    "dropout, more rows than a program takes": Case((150, 600), residual=FLOAT, dropout_p=0.1),
    "dropout, one row a tile": Case((3, 2049), residual=FLOAT, dropout_p=0.3),
    "dropout, float16": Case((6, 100), HALF, weight=HALF, bias=HALF, residual=HALF, dropout_p=0.1),
    "dropout, bfloat16": Case((6, 100), BF16, weight=BF16, bias=BF16, residual=BF16, dropout_p=0.1),
    "dropout, float32 residual stream": Case((6, 100), BF16, residual=FLOAT, dropout_p=0.1),
    "dropout, lower residual": Case((6, 100), FLOAT, residual=BF16, dropout_p=0.1),
    "dropout, nearly nothing is kept": Case((6, 100), residual=FLOAT, dropout_p=0.999),
}
WITH_DROPOUT = ("reference", "torch", "triton")
# Rows in chunks, which the interpreter is slow at.
LONG = {
    "one element of a third chunk": Case((3, 8193)),
    "five chunks": Case((2, 20001), residual=FLOAT, mean=100.0),
    "bfloat16": Case((2, 9000), BF16, weight=BF16, bias=BF16),
    "float32 residual stream": Case((9, 8200), BF16, residual=FLOAT),  # two tiles of columns
    "dropout": Case((3, 8201), HALF, residual=FLOAT, dropout_p=0.2),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [(n, b) for n, x in CASES.items() for b in (WITH_DROPOUT if x.dropout_p else BACKENDS)],
)
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_against_float64(name: str, center: bool, backend: str, device: str) -> None:
    if CASES[name].shape[-1] == 1 and not center:
        pytest.skip("rms_norm of one element is +-1: its gradient is nothing but rounding")
    check(dataclasses.replace(CASES[name], center=center, device=device), backend)


@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.long] * (x not in ("bfloat16", "dropout"))) for x in LONG],
)
def test_long_rows(name: str, center: bool, device: str) -> None:
    check(dataclasses.replace(LONG[name], center=center, device=device), "triton")


@pytest.mark.parametrize("backend", ("reference", "torch"))
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_float64(center: bool, backend: str, device: str) -> None:
    case = Case((5, 33), DOUBLE, center, DOUBLE, DOUBLE, residual=DOUBLE, device=device)
    check(case, backend)
    check(dataclasses.replace(case, weight=FLOAT, residual=FLOAT), backend)
    check(dataclasses.replace(case, dropout_p=0.3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.long] * (n > 3)) for n in range(12)]
)
def test_random_problems(seed: int, backend: str, device: str) -> None:
    r = random.Random(seed)
    dtype = r.choice((HALF, BF16, FLOAT))
    leading = [r.randint(1, 6) for _ in range(r.randint(1, 3))]
    case = Case(
        # rms_norm of one element is +-1: its gradient is nothing but rounding.
        shape=(*leading, r.choice((r.randint(2, 40), r.randint(2, 3000), 4 * r.randint(1, 500)))),
        dtype=dtype,
        center=r.random() < 0.5,
        weight=r.choice((None, dtype, FLOAT)),
        bias=r.choice((None, dtype, FLOAT)),
        residual=r.choice((None, dtype, FLOAT)),
        eps=r.choice((1e-6, 1e-5, 1e-3)),
        mean=r.choice((0.0, 3.0)),
        device=device,
        seed=seed,
    )
    check(case, backend)
    if case.residual is not None and backend != "cuda":
        check(dataclasses.replace(case, dropout_p=r.choice((0.1, 0.5, 0.9))), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_eps(backend: str, device: str) -> None:
    """Rows as small as eps, where another eps would show; float32's for 16-bit inputs, as ATen."""
    sizes = {FLOAT: 3e-4, HALF: 3e-4, BF16: 3e-4}
    if backend not in KERNELS:
        sizes[DOUBLE] = 1e-8
    for dtype, size in sizes.items():
        x = torch.full((2, 8), size, dtype=dtype, device=device)
        ours = fastattn.rms_norm(x, backend=backend)
        torch.testing.assert_close(ours, F.rms_norm(x, (8,)))
        assert ours.max() < 0.9  # it is 1 without eps


OF_DROPOUT = [(0.0, backend) for backend in BACKENDS] + [(0.4, x) for x in WITH_DROPOUT]


@pytest.mark.parametrize(("dropout_p", "backend"), OF_DROPOUT)
def test_any_strides(dropout_p: float, backend: str, device: str) -> None:
    """An element that is dropped has its place by row and column, wherever the memory has it."""
    case = Case((4, 6, 24), residual=FLOAT, dropout_p=dropout_p, device=device)
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
        check(case, backend, inputs | {"x": x})
        check(case, backend, inputs | {"residual": x})
    check(case, backend, inputs | {"weight": torch.randn(48, device=device)[::2]})
    check(case, backend, inputs | {"weight": torch.randn(1, device=device).expand(24)})


@pytest.mark.parametrize("backend", KERNELS)
def test_evenly_spaced_rows_are_read_in_place(backend: str, device: str) -> None:
    kernels = importlib.import_module(f"fastattn.ops.layer_norm.{backend}")
    x = torch.randn(4, 6, 3, 24, device=device)[:, :, 1]
    residual = torch.randn(4, 6, 30, device=device)[..., :24]
    with laws.Operands("clone") as copies:  # the interpreter's own copies are others
        kernels.forward(x, residual, None, None, 1e-5, True, FLOAT)
    assert not copies.seen


@pytest.mark.parametrize(("dropout_p", "backend"), OF_DROPOUT)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0,), (0, 0)])
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_empty(
    center: bool, shape: tuple[int, ...], dropout_p: float, backend: str, device: str
) -> None:
    """Nothing in, nothing out; the weights' gradients are zeros, not garbage."""
    case = Case(shape, center=center, residual=FLOAT, dropout_p=dropout_p, device=device)
    inputs = case.inputs()
    cotangents = [torch.ones(shape, device=device)] * 2
    ours = outputs_and_gradients(case.ours(backend), inputs, cotangents)
    expected = outputs_and_gradients(case.eager, inputs, cotangents)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows(backend: str, device: str) -> None:
    """No variance: the output is the bias, and the gradient is that of the formula."""
    x = torch.full((3, 48), 7.25, device=device, requires_grad=True)
    weight, bias = torch.randn(2, 48, device=device)
    out = fastattn.layer_norm(x, weight, bias, backend=backend)
    torch.testing.assert_close(out, bias.expand(3, 48), rtol=0, atol=0)
    dout = torch.randn(3, 48, device=device)
    (dx,) = torch.autograd.grad(out, x, dout)
    g = dout * weight
    torch.testing.assert_close(dx, (g - g.mean(-1, keepdim=True)) / 1e-5**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", (40, 264))  # in a part of a warp, in a warp
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_a_bad_row_stays_alone(center: bool, hidden: int, backend: str, device: str) -> None:
    """NaN or Inf in a row leave the rows beside it, in the same tile, as they were."""
    case = Case((6, hidden), center=center, device=device)
    cotangent = torch.randn(6, hidden, device=device)
    laws.bad_rows_stay_alone(case.ours(backend), case.inputs(), cotangent)


@pytest.mark.parametrize("shape", [(90, 300), (3, 8200)])
def test_same_inputs_same_bits(shape: tuple[int, int], device: str) -> None:
    case = Case(shape, residual=FLOAT, device=device)
    inputs = case.inputs()
    cotangents = [torch.randn(shape, device=device) for _ in range(2)]
    laws.same_bits(lambda: outputs_and_gradients(case.ours("triton"), inputs, cotangents))


def test_many_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The sum over programs goes round its own loop, of 64 at a time."""
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 50)
    check(Case((150, 1025), device=device), "triton")  # one row a tile, 150 programs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (HALF, BF16))
@pytest.mark.parametrize("hidden", (40, 8200))
def test_the_sum_that_is_normalised_is_the_one_returned(
    hidden: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Rounded to its dtype first: normalising the returned sum again gives the same bits."""
    if (backend, dtype, triton_runs()) == ("triton", BF16, "interpreted"):
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds")
    x, residual = torch.randn(2, 3, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, device=device)
    out, stream = fastattn.layer_norm(x, weight, residual=residual, backend=backend)
    assert torch.equal(stream, x + residual)
    assert torch.equal(out, fastattn.layer_norm(stream, weight, backend=backend))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("hidden", (40, 1032, 3000))
def test_a_row_does_not_depend_on_its_batch(hidden: int, backend: str, device: str) -> None:
    x = torch.randn(7, hidden, device=device)
    weight = torch.randn(hidden, device=device)
    together = fastattn.layer_norm(x, weight, backend=backend)
    for i in range(7):
        assert torch.equal(fastattn.layer_norm(x[i], weight, backend=backend), together[i])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("hidden", (24, 8200))
@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("x",), ("residual", "bias")])
def test_gradients_of_some_inputs_alone(
    wanted: tuple[str, ...], hidden: int, backend: str, device: str
) -> None:
    case = Case((3, hidden), residual=FLOAT, device=device)
    inputs = case.inputs()
    dout = torch.randn(3, hidden, device=device)

    def grads(norm: Any) -> tuple[torch.Tensor, ...]:
        leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in inputs.items()}
        out, _ = norm(**leaves)
        return torch.autograd.grad(out, [leaves[n] for n in wanted], dout)

    torch.testing.assert_close(grads(case.ours(backend)), grads(case.eager))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", (0, 1), ids=("out", "stream"))
def test_gradients_through_one_output_alone(used: int, backend: str, device: str) -> None:
    case = Case((4, 24), BF16, residual=FLOAT, device=device)
    inputs = case.inputs()
    cotangent = torch.randn(4, 24, device=device)

    def grads(norm: Any) -> tuple[torch.Tensor | None, ...]:
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        return torch.autograd.grad(
            norm(**leaves)[used], list(leaves.values()), cotangent, allow_unused=True
        )

    for ours, expected in zip(grads(case.ours(backend)), grads(case.eager), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            torch.testing.assert_close(ours, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("dropout_p", "backend"), [(0.0, "triton"), (0.0, "cuda"), (0.1, "triton")]
)
def test_what_is_kept_for_the_backward(dropout_p: float, backend: str, device: str) -> None:
    """The sum, the weight, two floats a row, a seed: no mask or copy of x, residual, the output."""
    x, residual = torch.randn(2, 64, 256, device=device, requires_grad=True)
    weight = torch.randn(256, device=device, requires_grad=True)
    options: Any = {"residual": residual, "dropout_p": dropout_p, "backend": backend}
    outs: list[Any] = []
    kept = laws.kept(lambda: outs.append(fastattn.layer_norm(x, weight, **options)))
    assert sorted(t.numel() for t in kept) == [1] * bool(dropout_p) + [2 * 64, 256, 64 * 256]
    assert outs[0][1].data_ptr() in [t.data_ptr() for t in kept]  # the stream


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("hidden", (33, 64))
@pytest.mark.parametrize("center", (True, False), ids=("layer_norm", "rms_norm"))
def test_output_in_float32(center: bool, hidden: int, backend: str, device: str) -> None:
    """What autocast asks of the kernels on a GPU: 16 bits in, float32 out, and back."""
    x = torch.randn(5, hidden, device=device).to(BF16).requires_grad_()
    weight = torch.randn(hidden, device=device).requires_grad_()
    dout = torch.randn(5, hidden, device=device)
    out, _, _ = torch.ops.fastattn.layer_norm(
        x, None, weight, None, None, 0.0, 1e-5, center, FLOAT, backend, True
    )
    assert out.dtype == FLOAT
    norm = F.layer_norm if center else F.rms_norm
    expected = norm(x.float(), (hidden,), weight, eps=1e-5)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out, (x, weight), dout)
    assert [grad.dtype for grad in ours] == [BF16, FLOAT]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (x, weight), dout))


def test_tiles_cover_every_size() -> None:
    """Whole rows where the table says so, and never more elements a thread than its reason."""
    for hidden in range(1, tiles.MAX_HIDDEN + 1, 61):
        for table, per_thread in ((tiles.forward, 32), (tiles.backward, 16)):
            tile = table(hidden)
            assert (tile.block >= hidden) == (hidden <= 8192)
            assert tile.rows * tile.block <= 32 * tile.num_warps * per_thread
            assert tile.block & (tile.block - 1) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 9 GB of GPU memory")
def test_more_than_two_to_the_31_elements() -> None:
    hidden, rows = 1024, 2**21 + 3
    x = torch.empty(rows, hidden, device="cuda", dtype=HALF).normal_().requires_grad_()
    out = fastattn.layer_norm(x, backend="triton")
    last = x.detach()[-5:].requires_grad_()
    expected = F.layer_norm(last, (hidden,))
    torch.testing.assert_close(out[-5:], expected)
    dout = torch.zeros_like(out)
    dout[-5:] = torch.randn(5, hidden, device="cuda")
    (dx,) = torch.autograd.grad(out, x, dout)
    torch.testing.assert_close(dx[-5:], torch.autograd.grad(expected, last, dout[-5:])[0])
