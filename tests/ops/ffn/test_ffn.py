"""ffn against float64 on every backend; then what it owes beyond the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from ops.ffn.cases import ACTIVATIONS, Case, check, output_and_gradients

import fastattn
from fastattn.backends import triton_runs
from fastattn.ops.common import launch
from fastattn.ops.ffn import aten, tiles

BACKENDS = ("reference", "torch", "triton")
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Of two bytes, in which every backend computes: Triton's interpreter does bfloat16 dots wrong.
HALVES = (HALF,) if triton_runs() == "interpreted" else (HALF, BF16)
LAYOUTS = ("linear", "conv1d")

# Each case has its reason. "Tile" is of tiles.py, for the interpreter's 4 "multiprocessors".
CASES = {
    "one token": Case((16,), 32, 16),
    "few tokens": Case((2, 3, 32), 64, 48),
    "few tokens, odd": Case((3, 11), 37, 5),
    "one feature": Case((9, 1), 12, 1),
    "unaligned tile, odd": Case((70, 33), 75, 41),
    "unaligned tile, whole": Case((128, 32), 72, 40, HALF),  # hidden % 16 != 0, K % 32 == 0
    "medium tile": Case((66, 32), 48, 16),
    "medium tile, whole": Case((128, 64), 128, 64, HALF),
    "large tile, masked": Case((300, 80), 528, 48, HALF),  # K % 64 != 0, N % 256 != 0
    "large tile, whole": Case((512, 64), 512, 64, HALF),
    "large tile, float32": Case((300, 48), 272, 80),
    "two groups of rows of tiles": Case((1100, 17), 70, 9, HALF),
    "three parts of column sums": Case((600, 8), 24, 72),
    "float16": Case((6, 100), 60, 20, HALF),
    "no b1": Case((7, 24), 48, 16, bias1=False),
    "no b2": Case((7, 24), 48, 16, bias2=False),
    "no bias": Case((70, 24), 48, 16, HALF, bias1=False, bias2=False),
    "gated, few tokens": Case((2, 3, 32), 64, 48, gated=True),
    "gated, few tokens, odd": Case((3, 11), 37, 5, gated=True),
    "gated, unaligned tile": Case((70, 33), 75, 41, gated=True),
    "gated, medium tile": Case((66, 32), 48, 16, gated=True),
    "gated, large tile, masked": Case((300, 80), 528, 48, HALF, gated=True),
    "gated, large tile, whole": Case((512, 64), 512, 64, HALF, gated=True),
    "gated, large tile, float32": Case((300, 48), 272, 80, gated=True),
    "gated, two groups of rows": Case((1100, 17), 70, 9, HALF, gated=True),
    "gated, no gate_bias": Case((7, 24), 48, 16, gated=True, gate_bias=False),
    "gated, no b1": Case((7, 24), 48, 16, gated=True, bias1=False),
    "gated, no bias": Case(
        (70, 24), 48, 16, HALF, bias1=False, bias2=False, gated=True, gate_bias=False
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, layout: str, backend: str, device: str) -> None:
    check(dataclasses.replace(CASES[name], layout=layout, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (FLOAT, HALF))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("recompute", (False, True))
def test_activations(
    activation: str, recompute: bool, gated: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    for layout in LAYOUTS:
        case = Case((66, 40), 50, 24, dtype, activation, layout, gated=gated, device=device)
        check(dataclasses.replace(case, recompute=recompute), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16(activation: str, backend: str, device: str) -> None:
    if backend == "triton" and triton_runs() == "interpreted":
        pytest.skip("Triton's interpreter computes bfloat16 dots wrong")
    for shape, hidden in (((66, 40), 50), ((3, 64), 128), ((128, 64), 256)):
        check(Case(shape, hidden, 24, BF16, activation, device=device), backend)
        check(Case(shape, hidden, 24, BF16, activation, gated=True, device=device), backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", (BF16, HALF, FLOAT))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", (False, True))
def test_enough_tokens_for_a_gpu(gated: bool, layout: str, dtype: torch.dtype) -> None:
    """The large tile, whole and masked, which a GPU takes only where there are many of them."""
    whole = Case((8192, 768), 3072, 768, dtype, layout=layout, gated=gated, device="cuda")
    check(whole, "triton")
    check(dataclasses.replace(whole, shape=(8000, 784), hidden=3088, out_features=400), "triton")


@pytest.mark.parametrize("backend", ("reference", "torch"))
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(layout: str, gated: bool, recompute: bool, backend: str, device: str) -> None:
    for activation in ACTIVATIONS:
        case = Case((5, 33), 20, 7, DOUBLE, activation, layout, gated=gated, device=device)
        check(dataclasses.replace(case, recompute=recompute), backend)


@pytest.mark.parametrize("seed", range(16))
def test_random_problems(seed: int, device: str) -> None:
    r = random.Random(seed)
    leading = [r.randint(1, 9) for _ in range(r.randint(0, 3))]
    case = Case(
        shape=(*leading, r.randint(1, 150)),
        hidden=r.choice((r.randint(1, 150), 16 * r.randint(1, 20))),
        out_features=r.randint(1, 150),
        dtype=r.choice((*HALVES, FLOAT)),
        activation=r.choice(list(ACTIVATIONS)),
        layout=r.choice(LAYOUTS),
        bias1=r.random() < 0.7,
        bias2=r.random() < 0.7,
        recompute=r.random() < 0.5,
        gated=r.random() < 0.5,
        gate_bias=r.random() < 0.7,
        device=device,
        seed=seed,
    )
    for backend in BACKENDS:
        check(case, backend)


# --- strides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_x(backend: str, device: str) -> None:
    case = Case((4, 6, 24), 40, 16, device=device)
    inputs = case.inputs()
    wide = torch.randn(4, 6, 3, 24, device=device)
    for x in (
        wide[:, :, 1],  # a slice of a joint projection: rows evenly spaced
        wide[:, 1:2, 0].expand(4, 6, 24),
        inputs["x"].transpose(0, 1).contiguous().transpose(0, 1),  # rows not evenly spaced
        torch.randn(4, 6, 48, device=device)[..., ::2],  # last dimension strided
        torch.randn(24, device=device).expand(4, 6, 24),  # one row, stride 0
        torch.randn(4, 6, 1, device=device).expand(4, 6, 24),  # last dimension expanded
    ):
        check(case, backend, inputs | {"x": x})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_the_weights(layout: str, backend: str, device: str) -> None:
    case = Case((7, 24), 40, 16, layout=layout, gated=True, device=device)
    inputs = case.inputs()
    for name in ("w1", "w2", "gate"):
        weight = inputs[name]
        rows, cols = weight.shape
        padded = torch.randn(rows, 2 * cols, device=device)
        for view in (
            weight.t().contiguous().t(),  # the transposed view of a buffer
            padded[:, cols:],  # a half of a joint weight
            padded[:, ::2],  # no stride is 1
            torch.randn(1, cols, device=device).expand(rows, cols),
        ):
            check(case, backend, inputs | {name: view})
    check(case, backend, inputs | {"b1": torch.randn(80, device=device)[::2]})
    check(case, backend, inputs | {"gate_bias": torch.randn(80, device=device)[::2]})
    check(case, backend, inputs | {"b1": torch.randn(1, device=device).expand(40)})
    check(case, backend, inputs | {"b2": torch.randn(1, device=device).expand(16)})


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_cotangent(backend: str, device: str) -> None:
    """What .sum().backward() hands to the backward: one number, stride 0."""
    case = Case((70, 24), 40, 16, gated=True, device=device)
    inputs = case.inputs()
    for cotangent in (
        torch.ones((), device=device).expand(70, 16),
        torch.randn(16, 70, device=device).t(),
        torch.randn(70, 32, device=device)[:, ::2],
    ):
        ours = output_and_gradients(case.ours(backend), inputs, cotangent)
        torch.testing.assert_close(ours, output_and_gradients(case.eager, inputs, cotangent))


def _launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[torch.Tensor], Any]]:
    """The launches from here on: kernel, tensors, constants."""
    launches: list[tuple[str, list[torch.Tensor], Any]] = []

    def spy(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        launches.append((kernel.__name__, tensors, constants))
        run(kernel, grid, *args, **constants)

    run = launch.launch
    monkeypatch.setattr(launch, "launch", spy)
    return launches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", (False, True))
def test_weights_and_rows_are_read_in_place(
    transposed: bool, layout: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    launches = _launched(monkeypatch)
    case = Case((4, 24), 40, 16, layout=layout, gated=True, device=device)
    inputs = case.inputs()
    if transposed:
        inputs |= {name: inputs[name].t().contiguous().t() for name in ("w1", "w2", "gate")}
    inputs["x"] = torch.randn(4, 3, 24, device=device)[:, 1]
    output_and_gradients(case.ours("triton"), inputs, torch.randn(4, 16, device=device))
    read = {name: [t.data_ptr() for t in tensors] for name, tensors, _ in launches}
    assert inputs["w1"].data_ptr() in read["_forward_kernel"]
    assert inputs["gate"].data_ptr() in read["_forward_kernel"]
    assert inputs["x"].data_ptr() in read["_forward_kernel"]
    assert inputs["w2"].data_ptr() in read["_backward_kernel"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_lie_as_the_weights_do(layout: str, device: str) -> None:
    case = Case((4, 24), 40, 16, layout=layout, gated=True, device=device)
    inputs = case.inputs()
    inputs["w1"], inputs["gate"] = (inputs[n].t().contiguous().t() for n in ("w1", "gate"))
    inputs["w2"] = torch.randn(inputs["w2"].shape[0], 64, device=device)[:, : inputs["w2"].shape[1]]
    grads = output_and_gradients(case.ours("triton"), inputs, torch.ones(4, 16, device=device))
    assert grads["dw1"].stride() == inputs["w1"].stride()
    assert grads["dgate"].stride() == inputs["gate"].stride()
    assert grads["dw2"].is_contiguous()


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("recompute", (False, True))
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
    recompute: bool,
    gated: bool,
    layout: str,
    backend: str,
    device: str,
) -> None:
    """Shapes and values as torch's: sums over nothing are zeros, not garbage."""
    case = Case(shape, hidden, out_features, layout=layout, gated=gated, device=device)
    case = dataclasses.replace(case, recompute=recompute)
    inputs = case.inputs()
    cotangent = torch.ones((*shape[:-1], out_features), device=device)
    ours = output_and_gradients(case.ours(backend), inputs, cotangent)
    expected = output_and_gradients(case.eager, inputs, cotangent)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # e^x may well be inf
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_everywhere(activation: str, device: str) -> None:
    """1 -> 1 -> 1 with weights 1 is the activation: its tails, and values that overflow a cube."""
    tails = torch.linspace(-40, 40, 4001)
    extremes = torch.tensor([0.0, 1e-30, -1e-30, 1e4, -1e4, 1e15, -1e15, 3e38, -3e38])
    x = torch.cat([tails, extremes]).to(device).unsqueeze(1)
    one = torch.ones(1, 1, device=device)

    def value_and_slope(function: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        out = function(x)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    ours = value_and_slope(
        lambda x: fastattn.ffn(x, one, None, one, None, activation, backend="triton"), x
    )
    expected = value_and_slope(ACTIVATIONS[activation], x.double())
    # 1 + erf(x) cancels on the left, in ATen too.
    absolute = 1e-6 if activation == "gelu" else 1e-7
    for value, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=absolute)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", (False, True))
def test_a_bad_token_stays_alone(gated: bool, activation: str, backend: str, device: str) -> None:
    """NaN or Inf in a token leave the tokens beside it, in the same tile, as they were."""
    case = Case((6, 40), 32, 24, activation=activation, gated=gated, device=device)
    inputs = case.inputs()
    ffn = case.ours(backend)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        out = ffn(**(inputs | {"x": x}))
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    bad = inputs["x"].clone()
    bad[1, 3], bad[4, 0] = float("nan"), float("inf")
    (clean, clean_grad), (out, grad) = run(inputs["x"]), run(bad)
    good = [0, 2, 3, 5]
    assert torch.equal(out[good], clean[good])
    assert torch.equal(grad[good], clean_grad[good])
    assert out[1].isnan().all()
    assert not out[4].isfinite().all()


# --- what it owes beyond the numbers -------------------------------------------------------------


@pytest.mark.parametrize("dtype", (FLOAT, *HALVES))
@pytest.mark.parametrize("gated", (False, True))
def test_same_inputs_same_bits(gated: bool, dtype: torch.dtype, device: str) -> None:
    case = Case((600, 40), 80, 48, dtype, gated=gated, device=device)
    inputs = case.inputs()
    cotangent = torch.randn(600, 48, device=device).to(dtype)
    first, second, third = (
        output_and_gradients(
            dataclasses.replace(case, recompute=recompute).ours("triton"), inputs, cotangent
        )
        for recompute in (False, False, True)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, third[name]), f"{name}, recomputed"


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(
    "wanted",
    [
        ("x",), ("w1",), ("b1",), ("w2",), ("b2",), ("w2", "b2"), ("x", "b2"),
        ("gate",), ("gate_bias",), ("x", "gate"),
    ],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("gated", (False, True))
def test_gradients_of_some_inputs_alone(
    wanted: tuple[str, ...],
    gated: bool,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    """What is frozen costs nothing: no product for b2 alone."""
    if not gated and {"gate", "gate_bias"} & {*wanted}:
        pytest.skip("there is no gate")
    launches = _launched(monkeypatch)
    case = Case((66, 24), 40, 16, recompute=recompute, gated=gated, device=device)
    inputs = case.inputs()
    cotangent = torch.randn(66, 16, device=device)

    def grads(function: Any) -> tuple[torch.Tensor, ...]:
        leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in inputs.items()}
        return torch.autograd.grad(function(**leaves), [leaves[n] for n in wanted], cotangent)

    torch.testing.assert_close(grads(case.ours("triton")), grads(case.eager))
    kernels = [name for name, _, _ in launches]
    assert kernels.count("_backward_kernel") == (wanted != ("b2",))
    assert kernels.count("_forward_kernel") == (2 if recompute and wanted != ("b2",) else 1)
    for name, _, constants in launches:
        if name == "_backward_kernel":
            assert constants["STORE_ACTIVATED"] == ("w2" in wanted)
            assert constants["STORE_SUMS"] == ("b1" in wanted or "gate_bias" in wanted)


def test_without_gradients_nothing_is_stored_for_them(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    launches = _launched(monkeypatch)
    case = Case((4, 24), 40, 16, device=device)
    inputs = case.inputs()
    case.ours("triton")(**inputs)
    inputs["w1"].requires_grad_()
    with torch.no_grad():
        case.ours("triton")(**inputs)
    case.ours("triton")(**inputs)
    assert [constants["STORE_PRE"] for _, _, constants in launches] == [False, False, True]


def test_what_triton_keeps_for_the_backward(device: str) -> None:
    """x and the pre-activation, with a gate both, or x alone; never the hidden layer after it."""
    kept: list[int] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    for gated, recompute, extra in (
        (False, False, [64 * 40]),
        (False, True, []),
        (True, False, [2 * 64 * 40]),
        (True, True, []),
    ):
        case = Case((64, 24), 40, 16, gated=gated, recompute=recompute, device=device)
        leaves = {n: x.requires_grad_() for n, x in case.inputs().items()}
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            case.ours("triton")(**leaves)
        assert sorted(kept) == sorted([leaf.numel() for leaf in leaves.values()] + extra)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", (False, True))
def test_torch_recomputes_only_when_asked(
    gated: bool, layout: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    calls = []
    activate = aten._activate
    monkeypatch.setattr(aten, "_activate", lambda *args: calls.append(1) or activate(*args))
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", (False, True))
def test_inputs_are_left_alone(
    gated: bool, layout: str, activation: str, backend: str, device: str
) -> None:
    """The activation in place is of our own hidden layer: even where w1 is the identity."""
    case = Case(
        (5, 16), 16, 16, activation=activation, layout=layout, bias1=False, gated=gated,
        gate_bias=False, device=device,
    )  # fmt: skip
    inputs = case.inputs()
    inputs |= {name: torch.eye(16, device=device) for name in inputs if name in ("w1", "gate")}
    before = {name: x.clone() for name, x in inputs.items()}
    with torch.no_grad():
        case.ours(backend)(**inputs)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name


def test_tiles_fit_every_gpu() -> None:
    """The blocks in flight fit the shared memory; tl.dot takes the sizes."""
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
    chosen = set()
    for architecture, limit in limits.items():
        for size in (2, 4):
            for tokens in (1, tiles.FEW_TOKENS, tiles.FEW_TOKENS + 1, 1024, 65536):
                for aligned, gated in itertools.product((False, True), repeat=2):
                    tile = tiles.tile(architecture, size, tokens, 3072, 132, aligned, gated)
                    chosen.add(tile)
                    columns = 2 * tile.block_n if gated else tile.block_n
                    block = (tile.block_m + columns) * tile.block_k * size
                    assert tile.stages * block <= limit * 1024
                    for n in (tile.block_m, tile.block_n, tile.block_k):
                        assert n >= 16
                        assert n & (n - 1) == 0
                    assert tile.block_m <= 128  # MAX_HIDDEN of triton.py
    assert len(chosen) == 19


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
