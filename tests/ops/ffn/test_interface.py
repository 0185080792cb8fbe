"""ffn's boundary: errors, dispatch, registration, and the ways torch can look through it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from ops import laws
from ops.backends import widest
from ops.ffn.cases import ACTIVATIONS, GATES, Case, Function, fitted, output_and_gradients

import fastattn
from fastattn.backends import triton_runs

KERNELS = ("triton", "cuda", "gluon")
LAYOUTS = ("linear", "conv1d")
NAMES = ("x", "w1", "b1", "w2", "b2")
GATE = ("gate", "gate_bias")

X, W1, B1 = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randn(20)
W2, B2 = torch.randn(5, 20), torch.randn(5)
G, GB = torch.randn(20, 8), torch.randn(20)


def call(options: dict[str, Any]) -> torch.Tensor:
    """ffn on the tensors above, but for what `options` replace."""
    return fastattn.ffn(**({"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2} | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor; got list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have the shape \(..., in_features\)"),
        ({"x": torch.nested.nested_tensor([X[0]])}, TypeError, r"x is a nested tensor.*x.values\(\)"),
        ({"x": torch.nested.nested_tensor([X[0]], layout=torch.jagged)}, TypeError, "x is a nested tensor"),
        ({"x": X.int()}, TypeError, "x must have one of the dtypes float16, .* got int32"),
        ({"x": X.half()}, TypeError, "must have one dtype; got x float16, w1 float32: cast"),
        ({"x": X[..., :7]}, ValueError, r"w1 must be \(hidden, in_features\) with in_features = 7"),
        ({"x": X.to("meta")}, ValueError, "must be on one device; got x on meta, w1 on cpu"),
        ({"w1": None}, TypeError, "w1 must be a torch.Tensor; got NoneType"),
        ({"w1": W1.tolist()}, TypeError, "w1 must be a torch.Tensor; got list"),
        ({"w1": B1}, ValueError, r"w1 must have 2 dimensions \(hidden, in_features\); got .*\(20,\)"),
        ({"w1": W1.t()}, ValueError, r"layout='linear'; got \(8, 20\)$"),
        ({"w1": W1.t(), "w2": W2.t()}, ValueError, "got .8, 20.; the weights fit layout='conv1d'"),
        ({"layout": "conv1d"}, ValueError, r"got \(20, 8\); the weights fit layout='linear'"),
        ({"w1": W1[:, None]}, ValueError, r"w1 must have 2 dimensions .* got shape \(20, 1, 8\)"),
        ({"w1": W1[:19], "b1": None}, ValueError, r"w2 must be .* hidden = 19, as w1 \(19, 8\)"),
        ({"w2": W2.double()}, TypeError, "must have one dtype; got x float32, w2 float64"),
        ({"w2": W2.to("meta")}, ValueError, "must be on one device; got x on cpu, w2 on meta"),
        ({"b1": B2}, ValueError, r"b1 must have the shape \(hidden,\) = \(20,\), or be None"),
        ({"b1": B1[None]}, ValueError, r"b1 must have the shape .* got \(1, 20\)"),
        ({"b1": 1.0}, TypeError, "b1 must be a torch.Tensor or None; got float"),
        ({"b2": B1}, ValueError, r"b2 must have the shape \(out_features,\) = \(5,\), or be None"),
        ({"gate": G.tolist()}, TypeError, "gate must be a torch.Tensor or None; got list"),
        ({"gate": GB}, ValueError, r"gate must have 2 dimensions .hidden, in_features.; got .*.20,"),
        ({"gate": G[:19]}, ValueError, r"gate must have the shape of w1, .* \(20, 8\); got \(19, 8\)"),
        ({"gate": G.t()}, ValueError, r"shape of w1, .* got \(8, 20\); gate.t\(\) has it"),
        ({"gate": G.half()}, TypeError, "must have one dtype; got x float32, gate float16: cast"),
        ({"gate": G.to("meta")}, ValueError, "on one device; got x on cpu, gate on meta"),
        ({"gate_bias": GB}, ValueError, "gate_bias is the bias of gate, which is None: give gate"),
        ({"gate": G, "gate_bias": B2}, ValueError, r"gate_bias must have the shape .*\(20,\).*\(5,\)"),
        ({"activation": "swish"}, ValueError, "activation must be one of 'gelu_tanh', .* 'swish'"),
        ({"activation": None}, ValueError, "activation must be one of .* got None"),
        ({"activation": ["relu"]}, ValueError, "activation must be one of .* got"),
        ({"layout": "conv"}, ValueError, "layout must be one of 'linear', 'conv1d'; got 'conv'"),
        ({"recompute": 1}, TypeError, "recompute must be True or False; got int"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'gluon', 'cuda', 'triton', .* got 'fast'"),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    call({})
    for _ in range(2):  # an error is not forgotten by the cache of plans
        with pytest.raises(error, match=message):
            call(options)


def test_errors_of_a_square_weight() -> None:
    """8 -> 8 -> 8 fits both layouts: nothing to say, and nothing is guessed."""
    w = torch.randn(8, 8)
    linear = fastattn.ffn(X, w, None, w, None)
    conv1d = fastattn.ffn(X, w.t(), None, w.t(), None, layout="conv1d")
    torch.testing.assert_close(linear, conv1d)


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("triton", torch.float64, "float64"),
        ("cuda", torch.float32, "compute float16 and bfloat16, not float32"),
    ],
)
def test_what_kernels_decline(backend: str, dtype: torch.dtype, reason: str, device: str) -> None:
    tensors = [t.to(dtype).to(device) for t in (X, W1, B1, W2, B2)]
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        fastattn.ffn(*tensors, backend=backend)
    assert fastattn.ffn(*tensors).dtype == dtype  # left open, another backend takes it


@pytest.mark.skipif(triton_runs() != "interpreted", reason="of Triton's interpreter")
def test_what_the_interpreter_declines() -> None:
    with pytest.raises(fastattn.UnsupportedError, match="bfloat16 dots"):
        fastattn.ffn(*(t.bfloat16() for t in (X, W1, B1, W2, B2)), backend="triton")


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = fastattn.explain(
        fastattn.ffn, X, W1.clone().requires_grad_(), None, W2, B2, "silu", recompute=True
    )
    assert capsys.readouterr().out.strip() == str(explanation)
    assert explanation.backend == "torch"
    assert explanation.problem == (
        "x (2, 3, 8), hidden 20, out_features 5, silu, layout linear, float32 on cpu, no b1, "
        "recompute, with gradients"
    )
    gated = fastattn.explain(fastattn.ffn, X, W1, B1, W2, B2, gate=G)
    assert gated.problem.endswith(", gated, no gate_bias")
    with pytest.raises(ValueError, match="layout must be"):
        fastattn.explain(fastattn.ffn, X, W1, B1, W2, B2, layout="torch")


def test_no_plan_is_taken_for_another() -> None:
    """Calls that differ in one fact each, twice over: the cache of plans keeps them apart."""
    square = {"w1": torch.randn(8, 8), "b1": None, "w2": torch.randn(8, 8), "b2": None}
    calls: list[dict[str, Any]] = [
        {},
        {"x": X[0]},
        {"b1": None},
        {"b2": None},
        *({"activation": activation} for activation in ACTIVATIONS),
        {"w1": W1[:12], "b1": B1[:12], "w2": W2[:, :12]},
        {n: t.half() for n, t in zip(NAMES, (X, W1, B1, W2, B2), strict=True)},
        {"gate": G},
        {"gate": G, "gate_bias": GB},
        square,
        square | {"layout": "conv1d"},
    ]
    for _, options, backend in itertools.product(range(2), calls, ("reference", "torch", "triton")):
        a = {"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2} | options
        layout, activation = a.get("layout", "linear"), a.get("activation", "gelu_tanh")
        case = Case((8,), 1, 1, layout=layout, activation=activation)
        order = ("x", "w1", "w2", "b1", "b2", *GATE)
        exact = [None if a.get(n) is None else a[n].double() for n in order]
        expected = case.eager(*exact).to(a["x"].dtype)  # type: ignore[arg-type]
        out = call(options | {"backend": backend})
        tolerance = 1e-2 if out.dtype == torch.half else 1e-5
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_a_plan_of_inference_is_not_one_of_training() -> None:
    """Without gradients the activation is in place, which would break a backward."""
    leaves = {n: t.clone().requires_grad_() for n, t in zip(NAMES, (X, W1, B1, W2, B2))}
    for activation, gate in itertools.product(ACTIVATIONS, (None, G)):
        options: dict[str, Any] = {"activation": activation, "gate": gate}
        for _ in range(2):
            with torch.no_grad():
                call(leaves | options)
            with torch.inference_mode():
                call(options)
            call(options)
            call(leaves | options).sum().backward()


@pytest.mark.parametrize(("gated", "backend"), [(False, None), (True, None), *GATES])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_autocast(dtype: torch.dtype, gated: bool, backend: str | None, device: str) -> None:
    """As F.linear: computed and returned in autocast's dtype, gradients in the tensors' own."""
    case = fitted(Case((4, 8), 20, 5, dtype, gated=gated, device=device), backend)
    inputs = case.inputs()
    cotangent = torch.randn(4, case.out_features, device=device).half()
    with torch.autocast(device, torch.float16):
        ours = output_and_gradients(case.ours(backend), inputs, cotangent)
        eager = output_and_gradients(case.eager, inputs, cotangent)
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        torch.testing.assert_close(value, eager[name], rtol=2e-2, atol=2e-2)
    if backend in ("cuda", "gluon") and dtype == torch.float32:
        return
    with torch.autocast(device, torch.float16, enabled=False):
        assert case.ours(backend)(**inputs).dtype == dtype


@pytest.mark.parametrize("backend", (None, "torch", "reference"))
def test_autocast_of_mixed_and_of_float64(backend: str | None) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert call({"x": X.bfloat16(), "backend": backend}).dtype == torch.bfloat16
        double = {n: t.double() for n, t in zip(NAMES, (X, W1, B1, W2, B2), strict=True)}
        assert call(double | {"backend": backend}).dtype == torch.float64
        with pytest.raises(TypeError, match="must have one dtype; got x float32, w1 float64"):
            call({"w1": W1.double()})


@pytest.mark.parametrize("backend", (None, "torch", "reference"))
def test_meta_tensors(backend: str | None) -> None:
    """Models are built and traced on the meta device."""
    meta = {n: t.to("meta") for n, t in zip(NAMES, (X, W1, B1, W2, B2), strict=True)}
    out = call(meta | {"backend": backend})
    assert (out.shape, out.device.type) == ((2, 3, 5), "meta")


# --- registration --------------------------------------------------------------------------------


@pytest.mark.parametrize(("gated", "backend"), [g for g in GATES if g[1] in KERNELS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("save_pre", "bias"), [(True, True), (False, False)])
def test_opcheck(
    save_pre: bool, layout: str, bias: bool, gated: bool, backend: str, device: str
) -> None:
    case = Case(
        (3, 2, 8), 12, 4, widest(backend), layout=layout, bias1=bias, bias2=bias, gated=gated,
        gate_bias=bias, device=device,
    )  # fmt: skip
    inputs = fitted(case, backend).inputs()
    given = [inputs[n].requires_grad_() if n in inputs else None for n in (*NAMES, *GATE)]
    options = ("gelu_tanh", layout)
    forward = torch.ops.fastattn.ffn
    arguments = (*given, *options, save_pre, backend, True)
    laws.opcheck(forward, *arguments)
    with torch.no_grad():
        out, pre = forward(*arguments)
    saved = pre if save_pre else None
    tensors = (torch.randn_like(out), *given, saved)
    plain = [t if t is None else t.detach() for t in tensors]
    for needs in (
        (True, True, bias, True, bias, gated, gated and bias),
        (True, False, bias, False, False, False, gated and bias),
    ):
        laws.opcheck(torch.ops.fastattn.ffn_backward, *plain, needs, *options, backend, True)


@pytest.mark.parametrize(("gated", "backend"), GATES)
@pytest.mark.parametrize(("layout", "recompute"), [("linear", False), ("conv1d", True)])
def test_compiles_without_a_graph_break(
    layout: str, recompute: bool, gated: bool, backend: str, device: str
) -> None:
    dtype = widest(backend)
    case = Case((8,), 24, 8, dtype, layout=layout, recompute=recompute, gated=gated, device=device)
    weights = {n: t.requires_grad_() for n, t in case.inputs().items() if n != "x"}
    ffn = case.ours(backend)

    def step(x: torch.Tensor) -> torch.Tensor:
        return ffn(x=ffn(x=x, **weights), **weights).square().sum()

    def draw(length: int) -> list[torch.Tensor]:
        return [torch.randn(2, length, 8, device=device, dtype=dtype, requires_grad=True)]

    twice = backend == "reference" and torch.__version__ < (2, 12)  # torch 2.11 compiles it again
    laws.one_graph(step, draw, list(weights.values()), frames=None if twice else 1)


def test_compiles_with_the_default_choice() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fastattn.ffn, fullgraph=True, backend="aot_eager")
    for activation in ACTIVATIONS:
        arguments = (X, W1, B1, W2, B2, activation)
        torch.testing.assert_close(compiled(*arguments), fastattn.ffn(*arguments))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(*arguments), fastattn.ffn(*arguments))


# --- transforms and second derivatives -----------------------------------------------------------


# Layouts, activations and the gate do not meet: each of them once.
KINDS = [
    *(("linear", activation, False) for activation in ACTIVATIONS),
    ("conv1d", "gelu_tanh", False),
    ("linear", "silu", True),
]


def _double(
    layout: str, activation: str, gated: bool, recompute: bool
) -> tuple[Case, dict[str, Any]]:
    case = Case((3, 4), 6, 5, torch.float64, activation, layout, gated=gated, recompute=recompute)
    return case, case.inputs()


@pytest.mark.parametrize("backend", (None, "torch", "reference"))
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(("layout", "activation", "gated"), KINDS)
def test_functional_transforms(
    layout: str, activation: str, gated: bool, recompute: bool, backend: str | None
) -> None:
    case, inputs = _double(layout, activation, gated, recompute)
    x, weights = inputs.pop("x"), inputs
    ours, formula = (
        functools.partial(function, **weights) for function in (case.ours(backend), case.eager)
    )
    laws.functional_transforms(lambda x: ours(x=x), lambda x: formula(x=x), x)


def test_an_ensemble_of_weights() -> None:
    """vmap over the weights, as torch.func.stack_module_state gives them."""
    w1, w2 = torch.randn(3, 20, 8), torch.randn(3, 5, 20)
    together = torch.func.vmap(lambda w1, w2: fastattn.ffn(X, w1, None, w2, None))(w1, w2)
    for i in range(3):
        torch.testing.assert_close(together[i], fastattn.ffn(X, w1[i], None, w2[i], None))


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_refuse_transforms(backend: str, device: str) -> None:
    case = fitted(Case((3, 8), 20, 5, widest(backend), device=device), backend)
    inputs = case.inputs()
    x = inputs.pop("x")
    ffn = case.ours(backend)
    laws.kernels_refuse_transforms(lambda x: ffn(x=x, **inputs), x)


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(("layout", "activation", "gated"), [x for x in KINDS if "relu" not in x])
def test_second_derivative(
    layout: str, activation: str, gated: bool, recompute: bool, backend: str
) -> None:
    case, inputs = _double(layout, activation, gated, recompute)
    leaves = [t.requires_grad_() for t in inputs.values()]
    ours = case.ours(backend)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return ours(**dict(zip(inputs, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(("layout", "activation", "gated"), KINDS)
def test_second_derivative_of_the_registered_op(
    layout: str, activation: str, gated: bool, recompute: bool, device: str
) -> None:
    """A gradient penalty through the kernels against the formula, whole and with frozen weights."""
    case = Case(
        (4, 8), 20, 5, activation=activation, layout=layout, recompute=recompute, gated=gated,
        device=device,
    )  # fmt: skip
    inputs = case.inputs()
    cotangent = torch.randn(4, 5, device=device)

    def of(function: Function, trained: tuple[str, ...]) -> Function:
        return lambda *tensors: function(**inputs | dict(zip(trained, tensors)))

    for trained in (tuple(inputs), ("x",), ("w1", "b2")):
        both = of(case.ours("triton"), trained), of(case.eager, trained)
        laws.second_derivative(*both, [inputs[name] for name in trained], [cotangent])
