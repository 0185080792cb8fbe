"""ffn against float64 on every backend; then what it owes beyond the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from ops import laws
from ops.backends import widest
from ops.ffn.cases import ACTIVATIONS, BACKENDS, GATES, Case, check, output_and_gradients

import fastattn
from fastattn.backends import triton_runs
from fastattn.ops.common import launch, tiles
from fastattn.ops.ffn import aten

KERNELS = ("triton", "cuda", "gluon")
GATES_OF_KERNELS = [(gated, backend) for gated, backend in GATES if backend in KERNELS]
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LAYOUTS = ("linear", "conv1d")

# Each case has its reason. float32 means the widest dtype of the backend.
CASES = {
    "one token": Case((16,), 32, 16),
    "few tokens": Case((2, 3, 32), 64, 48),
    "few tokens, odd": Case((3, 11), 37, 5),
    "one feature": Case((9, 1), 12, 1),
    "several tiles, odd": Case((70, 33), 75, 41),
    "float16": Case((6, 100), 60, 20, HALF),
    "no b1": Case((7, 24), 48, 16, bias1=False),
    "no b2": Case((7, 24), 48, 16, bias2=False),
    "no bias": Case((70, 24), 48, 16, HALF, bias1=False, bias2=False),
    "gated, few tokens": Case((2, 3, 32), 64, 48, gated=True),
    "gated, few tokens, odd": Case((3, 11), 37, 5, gated=True),
    "gated, no gate_bias": Case((7, 24), 48, 16, gated=True, gate_bias=False),
    "gated, no b1": Case((7, 24), 48, 16, gated=True, bias1=False),
    "gated, no bias": Case(
        (70, 24), 48, 16, HALF, bias1=False, bias2=False, gated=True, gate_bias=False
    ),
}
# The tiles of tiles.py, for the interpreter's 4 "multiprocessors".
TRITON = {
    "unaligned tile, whole": Case((128, 32), 72, 40, HALF),  # hidden % 16 != 0, K % 32 == 0
    "medium tile": Case((66, 32), 48, 16),
    "medium tile, whole": Case((128, 64), 128, 64, HALF),
    "large tile, masked": Case((300, 80), 528, 48, HALF),  # K % 64 != 0, N % 256 != 0
    "large tile, whole": Case((512, 64), 512, 64, HALF),
    "large tile, float32": Case((300, 48), 272, 80),
    "two groups of rows of tiles": Case((1100, 17), 70, 9, HALF),
    "three parts of column sums": Case((600, 8), 24, 72),
    "gated, unaligned tile": Case((70, 33), 75, 41, gated=True),
    "gated, medium tile": Case((66, 32), 48, 16, gated=True),
    "gated, large tile, masked": Case((300, 80), 528, 48, HALF, gated=True),
    "gated, large tile, whole": Case((512, 64), 512, 64, HALF, gated=True),
    "gated, large tile, float32": Case((300, 48), 272, 80, gated=True),
    "gated, two groups of rows": Case((1100, 17), 70, 9, HALF, gated=True),
}


def runnable(case: Case, backend: str) -> Case:
    return dataclasses.replace(case, dtype=widest(backend)) if case.dtype == FLOAT else case


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, b) for name, case in CASES.items() for gated, b in GATES if gated == case.gated],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(name: str, layout: str, backend: str, device: str) -> None:
    case = dataclasses.replace(CASES[name], layout=layout, device=device)
    check(runnable(case, backend), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRITON)
def test_tiles(name: str, layout: str, device: str) -> None:
    check(dataclasses.replace(TRITON[name], layout=layout, device=device), "triton")


OF_DTYPE = [(HALF, False, backend) for backend in BACKENDS]
OF_DTYPE += [(FLOAT, gated, backend) for gated, backend in GATES if widest(backend) == FLOAT]


@pytest.mark.parametrize(("dtype", "gated", "backend"), OF_DTYPE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", (False, True))
def test_activations(
    activation: str, recompute: bool, gated: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    for layout in LAYOUTS:
        case = Case((66, 40), 50, 24, dtype, activation, layout, gated=gated, device=device)
        check(dataclasses.replace(case, recompute=recompute), backend)


@pytest.mark.parametrize(("gated", "backend"), GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16(activation: str, gated: bool, backend: str, device: str) -> None:
    if backend == "triton" and triton_runs() == "interpreted":
        pytest.skip("Triton's interpreter computes bfloat16 dots wrong")
    for shape, hidden in (((66, 40), 50), ((3, 64), 128), ((128, 64), 256)):
        check(Case(shape, hidden, 24, BF16, activation, gated=gated, device=device), backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", (BF16, HALF, FLOAT))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("gated", "backend"), GATES_OF_KERNELS)
def test_enough_tokens_for_a_gpu(
    layout: str, dtype: torch.dtype, gated: bool, backend: str
) -> None:
    """The large tile, whole and masked, which a GPU takes only where there are many of them."""
    for shape, hidden, out_features in (((8192, 768), 3072, 768), ((8000, 784), 3088, 400)):
        case = Case(shape, hidden, out_features, dtype, layout=layout, gated=gated, device="cuda")
        check(runnable(case, backend), backend)


@pytest.mark.parametrize("backend", ("reference", "torch"))
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(layout: str, recompute: bool, backend: str, device: str) -> None:
    for activation, gated in itertools.product(ACTIVATIONS, (False, True)):
        case = Case((5, 33), 20, 7, DOUBLE, activation, layout, gated=gated, device=device)
        check(dataclasses.replace(case, recompute=recompute), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 12))]
)
def test_random_problems(seed: int, backend: str, device: str) -> None:
    halves = (HALF,) if backend == "triton" and triton_runs() == "interpreted" else (HALF, BF16)
    r = random.Random(seed)
    leading = [r.randint(1, 9) for _ in range(r.randint(0, 3))]
    case = Case(
        shape=(*leading, r.randint(1, 150)),
        hidden=r.choice((r.randint(1, 150), 16 * r.randint(1, 20))),
        out_features=r.randint(1, 150),
        dtype=r.choice((*halves, widest(backend))),
        activation=r.choice(list(ACTIVATIONS)),
        layout=r.choice(LAYOUTS),
        bias1=r.random() < 0.7,
        bias2=r.random() < 0.7,
        recompute=r.random() < 0.5,
        gated=r.random() < 0.5 and (True, backend) in GATES,
        gate_bias=r.random() < 0.7,
        device=device,
        seed=seed,
    )
    check(case, backend)


# --- strides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_x(backend: str, device: str) -> None:
    case = Case((4, 6, 24), 40, 16, widest(backend), device=device)
    inputs = case.inputs()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(case.dtype)

    wide = normal(4, 6, 3, 24)
    for x in (
        wide[:, :, 1],  # a slice of a joint projection: rows evenly spaced
        normal(1729)[1:].view(4, 6, 72)[:, :, :24],  # and not aligned
        wide[:, 1:2, 0].expand(4, 6, 24),
        inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),  # rows not evenly spaced
        normal(4, 6, 48)[..., ::2],  # last dimension strided
        normal(24).expand(4, 6, 24),  # one row, stride 0
        normal(4, 6, 1).expand(4, 6, 24),  # last dimension expanded
    ):
        check(case, backend, inputs | {"x": x})


@pytest.mark.parametrize(("gated", "backend"), GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_the_weights(layout: str, gated: bool, backend: str, device: str) -> None:
    case = Case((7, 24), 40, 16, widest(backend), layout=layout, gated=gated, device=device)
    inputs = case.inputs()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(case.dtype)

    for name in ("w1", "w2", "gate") if gated else ("w1", "w2"):
        weight = inputs[name]
        rows, cols = weight.shape
        padded = normal(rows, 2 * cols)
        for view in (
            weight.t().contiguous().t(),  # the transposed view of a buffer
            padded[:, cols:],  # a half of a joint weight
            padded[:, ::2],  # no stride is 1
            normal(1, cols).expand(rows, cols),
        ):
            check(case, backend, inputs | {name: view})
    for name in ("b1", "gate_bias") if gated else ("b1",):
        check(case, backend, inputs | {name: normal(80)[::2]})
        check(case, backend, inputs | {name: normal(1).expand(40)})
    check(case, backend, inputs | {"b2": normal(1).expand(16)})


@pytest.mark.parametrize("backend", [b for gated, b in GATES if gated and widest(b) == FLOAT])
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_halves_of_a_joint_weight(
    layout: str, interleaved: bool, backend: str, device: str
) -> None:
    """Views of one tensor, side by side or in turns, and the gradient of the whole."""
    case = Case((70, 32), 48, 16, layout=layout, gated=True, device=device)
    inputs = case.inputs()
    dim = 0 if layout == "linear" else 1
    pair = [inputs.pop("w1"), inputs.pop("gate")]
    inputs["joint"] = (
        torch.stack(pair, dim + 1).flatten(dim, dim + 1) if interleaved else torch.cat(pair, dim)
    )

    def of(function: Any) -> Any:
        def run(joint: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
            w1, gate = (
                joint.unflatten(dim, (-1, 2)).unbind(dim + 1)
                if interleaved
                else joint.chunk(2, dim)
            )
            return function(w1=w1, gate=gate, **others)

        return run

    cotangent = torch.randn(70, 16, device=device)
    ours = output_and_gradients(of(case.ours(backend)), inputs, cotangent)
    torch.testing.assert_close(ours, output_and_gradients(of(case.eager), inputs, cotangent))


@pytest.mark.parametrize(("gated", "backend"), GATES)
def test_an_expanded_cotangent(gated: bool, backend: str, device: str) -> None:
    """What .sum().backward() hands to the backward: one number, stride 0."""
    case = Case((70, 24), 40, 16, widest(backend), gated=gated, device=device)
    for cotangent in (
        torch.ones((), dtype=case.dtype, device=device).expand(70, 16),
        torch.randn(16, 70, device=device).to(case.dtype).t(),
        torch.randn(70, 32, device=device).to(case.dtype)[:, ::2],
    ):
        check(case, backend, cotangent=cotangent)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", (False, True))
def test_weights_and_rows_are_read_in_place(transposed: bool, layout: str, device: str) -> None:
    case = Case((4, 24), 40, 16, layout=layout, gated=True, device=device)
    inputs = case.inputs()
    if transposed:
        inputs |= {name: inputs[name].t().contiguous().t() for name in ("w1", "w2", "gate")}
    inputs["x"] = torch.randn(4, 3, 24, device=device)[:, 1]
    with launch.recorded() as launches:
        output_and_gradients(case.ours("triton"), inputs, torch.randn(4, 16, device=device))
    read = {
        x.kernel.__name__: [t.data_ptr() for t in x.args if isinstance(t, torch.Tensor)]
        for x in launches
    }
    assert inputs["w1"].data_ptr() in read["_forward_kernel"]
    assert inputs["gate"].data_ptr() in read["_forward_kernel"]
    assert inputs["x"].data_ptr() in read["_forward_kernel"]
    assert inputs["w2"].data_ptr() in read["_backward_kernel"]


@pytest.mark.parametrize(("gated", "backend"), GATES_OF_KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_lie_as_the_weights_do(
    layout: str, gated: bool, backend: str, device: str
) -> None:
    case = Case((4, 24), 40, 16, widest(backend), layout=layout, gated=gated, device=device)
    inputs = case.inputs()
    into = ("w1", "gate") if gated else ("w1",)
    inputs |= {name: inputs[name].t().contiguous().t() for name in into}
    rows, columns = inputs["w2"].shape
    inputs["w2"] = torch.randn(rows, 64, device=device).to(case.dtype)[:, :columns]
    cotangent = torch.ones(4, 16, dtype=case.dtype, device=device)
    grads = output_and_gradients(case.ours(backend), inputs, cotangent)
    for name in into:
        assert grads[f"d{name}"].stride() == inputs[name].stride()
    assert grads["dw2"].is_contiguous()


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gated", "backend"), [x for x in GATES if x[1] != "gluon"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "hidden", "out_features"),
    [
        ((0, 8), 16, 4),
        ((2, 0, 8), 16, 4),
        ((3, 0), 16, 4),
        ((2, 3, 0), 16, 4),
        ((3, 8), 0, 4),
        ((3, 8), 16, 0),
        ((0,), 16, 4),
        ((0, 0), 0, 0),
    ],
)
def test_empty(
    shape: tuple[int, ...],
    hidden: int,
    out_features: int,
    layout: str,
    gated: bool,
    backend: str,
    device: str,
) -> None:
    """Shapes and values as torch's: sums over nothing are zeros, not garbage."""
    dtype = widest(backend)
    case = Case(shape, hidden, out_features, dtype, layout=layout, gated=gated, device=device)
    inputs = case.inputs()
    cotangent = torch.ones((*shape[:-1], out_features), dtype=dtype, device=device)
    expected = output_and_gradients(case.eager, inputs, cotangent)
    for recompute in (False, True):
        ours = dataclasses.replace(case, recompute=recompute).ours(backend)
        for name, value in output_and_gradients(ours, inputs, cotangent).items():
            torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # e^x may well be inf
@pytest.mark.parametrize("backend", ("triton", "cuda"))  # of one feature
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_everywhere(activation: str, backend: str, device: str) -> None:
    """1 -> 1 -> 1 with weights 1 is the activation: its tails, and values that overflow a cube."""
    dtype = widest(backend)
    tails = torch.linspace(-40, 40, 4001 if dtype == FLOAT else 321)
    small, middle, square, largest = (
        (1e-30, 1e4, 1e15, 3e38) if dtype == FLOAT else (6e-8, 1e3, 1e4, 65504.0)
    )
    extremes = torch.tensor(
        [0.0, *(s * x for x in (small, middle, square, largest) for s in (1, -1))]
    )
    x = torch.cat([tails, extremes]).to(dtype).to(device).unsqueeze(1)
    one = torch.ones(1, 1, dtype=dtype, device=device)

    def value_and_slope(function: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        out = function(x)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    ours = value_and_slope(
        lambda x: fastattn.ffn(x, one, None, one, None, activation, backend=backend), x
    )
    expected = value_and_slope(ACTIVATIONS[activation], x.double())
    # 1 + erf(x) cancels on the left, in ATen too.
    absolute = 1e-6 if activation == "gelu" else 1e-7
    relative, absolute = (1e-6, absolute) if dtype == FLOAT else (1e-3, 2e-6)
    for value, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=relative, atol=absolute)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(("gated", "backend"), GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_token_stays_alone(gated: bool, activation: str, backend: str, device: str) -> None:
    """NaN or Inf in a token leave the tokens beside it, in the same tile, as they were."""
    case = Case((6, 40), 32, 24, widest(backend), activation, gated=gated, device=device)
    inputs = case.inputs()
    cotangent = torch.randn(6, 24, device=device)
    laws.bad_rows_stay_alone(case.ours(backend), inputs, cotangent)


# --- what it owes beyond the numbers -------------------------------------------------------------


@pytest.mark.parametrize(("gated", "dtype"), [(False, FLOAT), (False, HALF), (True, HALF)])
def test_same_inputs_same_bits(gated: bool, dtype: torch.dtype, device: str) -> None:
    case = Case((600, 40), 80, 48, dtype, gated=gated, device=device)
    inputs = case.inputs()
    cotangent = torch.randn(600, 48, device=device).to(dtype)
    recompute = iter((False, False, True))

    def run() -> dict[str, torch.Tensor]:
        ours = dataclasses.replace(case, recompute=next(recompute)).ours("triton")
        return output_and_gradients(ours, inputs, cotangent)

    laws.same_bits(run, 3)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(
    "wanted",
    [
        ("x",), ("w1",), ("b1",), ("w2",), ("b2",), ("w2", "b2"), ("x", "b2"),
        ("gate",), ("gate_bias",), ("x", "gate"), ("w1", "gate_bias"),
    ],
    ids="+".join,
)  # fmt: skip
def test_gradients_of_some_inputs_alone(
    wanted: tuple[str, ...], recompute: bool, device: str
) -> None:
    """What is frozen costs nothing: no product where only b2 has a gradient."""
    gated = not {"gate", "gate_bias"}.isdisjoint(wanted)
    case = Case((66, 24), 40, 16, recompute=recompute, gated=gated, device=device)
    inputs, cotangent = case.inputs(), torch.randn(66, 16, device=device)
    with launch.recorded() as launches:
        ours = output_and_gradients(case.ours("triton"), inputs, cotangent, trained=wanted)
    eager = output_and_gradients(case.eager, inputs, cotangent, trained=wanted)
    torch.testing.assert_close(ours, eager)
    kernels = [x.kernel.__name__ for x in launches]
    assert kernels.count("_backward_kernel") == (wanted != ("b2",))
    assert kernels.count("_forward_kernel") == (2 if recompute and wanted != ("b2",) else 1)


def test_without_gradients_nothing_is_stored_for_them(device: str) -> None:
    case = Case((4, 24), 40, 16, device=device)
    inputs = case.inputs()
    with launch.recorded() as launches:
        case.ours("triton")(**inputs)
        inputs["w1"].requires_grad_()
        with torch.no_grad():
            case.ours("triton")(**inputs)
        case.ours("triton")(**inputs)
    assert [x.constants["STORE_PRE"] for x in launches] == [False, False, True]


@pytest.mark.parametrize(("gated", "backend"), GATES_OF_KERNELS)
@pytest.mark.parametrize("activation", ("gelu_tanh", "relu"))
def test_what_is_kept_for_the_backward(
    activation: str, gated: bool, backend: str, device: str
) -> None:
    """x and the pre-activation (of ReLU its result), with a gate both, or x alone.

    Never the hidden layer after it.
    """
    case = Case((64, 24), 40, 16, widest(backend), activation, gated=gated, device=device)
    leaves = {n: x.requires_grad_() for n, x in case.inputs().items()}
    for recompute, extra in ((False, [(2 if gated else 1) * 64 * 40]), (True, [])):
        ours = dataclasses.replace(case, recompute=recompute).ours(backend)
        kept = laws.kept(lambda ours=ours: ours(**leaves))
        expected = [leaf.numel() for leaf in leaves.values()] + extra
        assert sorted(x.numel() for x in kept) == sorted(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", (False, True))
def test_torch_recomputes_only_when_asked(
    gated: bool, layout: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    calls = []
    activate = aten.activate
    monkeypatch.setattr(aten, "activate", lambda *args: calls.append(1) or activate(*args))
    case = Case((5, 8), 16, 4, layout=layout, gated=gated, device=device)
    inputs, cotangent = case.inputs(), torch.ones(5, 4, device=device)
    for recompute, times in ((False, 1), (True, 2)):
        calls.clear()
        ours = dataclasses.replace(case, recompute=recompute).ours("torch")
        output_and_gradients(ours, inputs, cotangent)
        assert len(calls) == times
        calls.clear()
        ours(**inputs)  # no gradient is wanted: nothing to compute again
        assert len(calls) == 1


@pytest.mark.parametrize(("gated", "backend"), GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_left_alone(
    gated: bool, layout: str, activation: str, backend: str, device: str
) -> None:
    """The activation in place is of our own hidden layer: even where w1 is the identity."""
    dtype = widest(backend)
    case = Case(
        (5, 16), 16, 16, dtype, activation, layout, bias1=False, gated=gated, gate_bias=False,
        device=device,
    )  # fmt: skip
    inputs = case.inputs()
    identity = torch.eye(16, dtype=dtype, device=device)
    inputs |= dict.fromkeys(("w1", "gate") if gated else ("w1",), identity)
    before = {name: x.clone() for name, x in inputs.items()}
    with torch.no_grad():
        case.ours(backend)(**inputs)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name


def test_tiles_fit_every_gpu() -> None:
    """The blocks in flight fit the shared memory; tl.dot takes the sizes."""
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
    for architecture, limit in limits.items():
        for size in (2, 4):
            for tokens in (1, tiles.FEW_TOKENS, tiles.FEW_TOKENS + 1, 1024, 65536):
                for aligned, gated in itertools.product((False, True), repeat=2):
                    tile = tiles.tile(architecture, size, tokens, 3072, 132, aligned, gated)
                    columns = 2 * tile.block_n if gated else tile.block_n
                    block = (tile.block_m + columns) * tile.block_k * size
                    assert tile.stages * block <= limit * 1024
                    for n in (tile.block_m, tile.block_n, tile.block_k):
                        assert n >= 16
                        assert n & (n - 1) == 0
                    assert tile.block_m <= 128  # MAX_COLUMNS of products.py


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GB of GPU memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", (False, True))
def test_more_than_two_to_the_31_elements(gated: bool, layout: str) -> None:
    tokens, hidden = 2**20 + 3, 2064
    case = Case((tokens, 16), hidden, 16, HALF, layout=layout, gated=gated, device="cuda")
    inputs = {name: x.requires_grad_(name == "x") for name, x in case.inputs().items()}
    out = case.ours("triton")(**inputs)
    last = inputs | {"x": inputs["x"].detach()[-5:].requires_grad_()}
    expected = case.eager(**last)
    torch.testing.assert_close(out[-5:], expected, rtol=1e-2, atol=1e-2)
    dout = torch.zeros_like(out)
    dout[-5:] = torch.randn(5, 16, device="cuda")
    (dx,) = torch.autograd.grad(out, inputs["x"], dout)
    (dlast,) = torch.autograd.grad(expected, last["x"], dout[-5:])
    torch.testing.assert_close(dx[-5:], dlast, rtol=1e-2, atol=1e-2)
