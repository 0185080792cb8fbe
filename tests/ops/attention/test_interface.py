"""Attention's boundary: errors, dispatch, registration, and the ways torch can look through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import laws
from ops.backends import BACKENDS, assert_near, widest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

import fastattn
from fastattn import backends
from fastattn.ops.attention.call import Extras, Settings


def tensors(**changes: Any) -> dict[str, Any]:
    q = torch.randn(2, 5, 4, 8)
    k = torch.randn(2, 7, 2, 8)
    return {"q": q, "k": k, "v": k.clone()} | changes


BLOCK_MASK = fastattn.BlockMask.from_predicate(
    lambda b, h, i, j: i >= j, 1, 1, 64, 64, block_size=16
)

FLEX_MASK = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 5, 7, device="cpu")
NESTED = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)])
NESTED_JAGGED = torch.nested.nested_tensor([torch.randn(3, 4, 8)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor; got list"),
        ({"q": torch.randn(5, 4, 8)}, ValueError, r"q must have 4 dimensions .* got shape \(5, 4, 8\)"),
        ({"q": torch.randint(3, (2, 5, 4, 8))}, TypeError, "q must have one of the dtypes float16"),
        ({"k": torch.randn(2, 7, 2, 8).half()}, TypeError, "one dtype; got q torch.float32, k torch.float16"),
        ({"k": torch.randn(2, 7, 2, 8, device="meta")}, ValueError, "one device; got q on cpu, k on meta"),
        ({"k": torch.randn(3, 7, 2, 8)}, ValueError, "k must have q's batch size 2"),
        ({"k": torch.randn(2, 7, 2, 9)}, ValueError, "k must have q's head_dim 8"),
        ({"v": torch.randn(2, 6, 2, 8)}, ValueError, r"v must have k's shape \(2, 7, 2, 8\)"),
        ({"k": torch.randn(2, 7, 3, 8), "v": torch.randn(2, 7, 3, 8)}, ValueError, "multiple .* got 4 and 3"),
        ({"k": torch.randn(2, 7, 0, 8), "v": torch.randn(2, 7, 0, 8)}, ValueError, "multiple .* got 4 and 0"),
        ({"causal": "top"}, ValueError, "causal must be True .* got 'top'"),
        ({"causal": 2}, TypeError, "causal must be True .* got 2"),
        ({"window": 5}, ValueError, r"window must be \(left, right\).* got 5"),
        ({"window": (1, -2)}, ValueError, "window must be"),
        ({"window": (1.0, 2)}, ValueError, "window must be"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
        ({"bias": torch.zeros(2, 3, 5, 7)}, ValueError, r"bias must broadcast to .* \(2, 4, 5, 7\)"),
        ({"bias": torch.zeros(1, 2, 4, 5, 7)}, ValueError, "bias must broadcast"),
        ({"bias": torch.zeros(5, 7, dtype=torch.float64)}, TypeError, "bias must be float32 or have q's dtype"),
        ({"bias": torch.zeros(5, 7, device="meta")}, ValueError, "bias must be on q's device cpu; got meta"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must have the shape \(heads,\) = \(4,\)"),
        ({"alibi_slopes": torch.ones(4).int()}, TypeError, "alibi_slopes must be float32"),
        ({"sink": torch.ones(2)}, ValueError, r"sink must have the shape \(heads,\) = \(4,\)"),
        ({"sink": torch.ones(4, dtype=torch.float64)}, TypeError, "sink must be float32 or have q's dtype"),
        ({"document_ids": torch.zeros(2, 5).int()}, ValueError, "document_ids must be a pair"),
        ({"document_ids": (torch.zeros(2, 5).int(), torch.zeros(2, 5).int())}, ValueError, r"document_ids \(of k\) must have a number for every token"),
        ({"document_ids": (torch.zeros(2, 5), torch.zeros(2, 7))}, TypeError, "must be int32 or int64"),
        ({"document_ids": 3}, TypeError, "document_ids must be a tensor or a pair"),
        ({"block_mask": FLEX_MASK}, TypeError, r"got FlexAttention's, .*BlockMask.from_predicate\(block_mask.mask_mod"),
        ({"q": NESTED}, TypeError, "q is a nested tensor.*attention_varlen"),
        ({"q": NESTED_JAGGED}, TypeError, "q is a nested tensor.*attention_varlen"),
        ({"mask": torch.ones(5, 7).bool().to_sparse()}, TypeError, r"mask must be a dense tensor.*mask.to_dense\(\)"),
        ({"block_mask": torch.zeros(2, 2)}, TypeError, "block_mask must be a BlockMask; got Tensor"),
        ({"block_mask": BLOCK_MASK, "window": (1, 1)}, ValueError, "window and block_mask both say"),
        ({"block_mask": BLOCK_MASK}, ValueError, "block_mask must be made for"),
        ({"fp32_precision": "tf32"}, ValueError, "fp32_precision must be 'ieee' or 'tf32x3'; got 'tf32'"),
        ({"deterministic": 0}, TypeError, "deterministic must be True or False; got 0"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite; got nan"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a float; got str"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\); got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must lie in"),
        ({"mask": torch.zeros(2, 4, 5, 7)}, TypeError, "mask must be boolean"),
        ({"mask": torch.zeros(6, 7, dtype=torch.bool)}, ValueError, "mask must broadcast to"),
        ({"mask": torch.zeros(2, 3, 5, 7, dtype=torch.bool)}, ValueError, r"= \(2, 4, 5, 7\)"),
        ({"mask": torch.zeros(5, 7, dtype=torch.bool, device="meta")}, ValueError, "mask must be on q's device"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths must be int32 or int64"),
        ({"key_lengths": torch.tensor([1])}, ValueError, r"key_lengths must have the shape \(batch,\) = \(2,\)"),
        ({"key_lengths": [1, 2]}, TypeError, "key_lengths must be a torch.Tensor; got list"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'gluon', 'cuda', 'triton', 'torch', 'reference'; got 'fast'"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = tensors(**changes)
    q, k, v = (arguments.pop(name) for name in "qkv")
    for _ in range(2):  # an error is not forgotten by the cache of plans
        with pytest.raises(error, match=message):
            fastattn.attention(q, k, v, **arguments)


def test_a_mask_of_flex_attention_becomes_ours() -> None:
    """As the error says."""
    ours = fastattn.BlockMask.from_predicate(FLEX_MASK.mask_mod, *FLEX_MASK.shape)
    arguments = tensors(block_mask=ours)
    expected = fastattn.attention(**tensors(**arguments | {"block_mask": None}), causal="top_left")
    torch.testing.assert_close(fastattn.attention(**arguments), expected)


def test_lengths_are_not_read_where_they_cannot_be() -> None:
    """Of keys and of packed sequences: vmap, fake tensors, tracing."""
    x, lengths = torch.randn(2, 6, 2, 8), torch.tensor([3, 6])
    packed, cu_seqlens = x.flatten(0, 1), torch.tensor([0, 4, 12], dtype=torch.int32)

    def padded(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(x, x, x, key_lengths=lengths)

    def varlen(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return fastattn.attention_varlen(x, x, x, cu, cu, 8, 8)

    def unbounded(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return fastattn.attention_varlen(x, x, x, cu, cu)

    each = torch.vmap(lambda x, n: padded(x[None], n[None])[0])(x, lengths)
    torch.testing.assert_close(each, padded(x, lengths))
    several = torch.vmap(varlen)(packed[None], cu_seqlens[None])[0]
    torch.testing.assert_close(several, varlen(packed, cu_seqlens))
    for function, arguments in ((padded, (x, lengths)), (varlen, (packed, cu_seqlens))):
        for mode in ("real", "fake", "symbolic"):
            traced = make_fx(function, tracing_mode=mode)(*arguments)
            torch.testing.assert_close(traced(*arguments), function(*arguments))
        fake = FakeTensorMode()
        with fake:
            out = function(*(fake.from_tensor(argument) for argument in arguments))
        assert out.shape == arguments[0].shape
    # Nothing but the lengths themselves says how long the longest is.
    torch.testing.assert_close(
        torch.func.grad(lambda x: unbounded(x, cu_seqlens).sum())(packed),
        torch.func.grad(lambda x: varlen(x, cu_seqlens).sum())(packed),
    )
    with pytest.raises(ValueError, match="max_seqlen_q must be given where cu_seqlens_q cannot"):
        torch.vmap(unbounded)(packed[None], cu_seqlens[None])


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("triton", {"width": 600}, "head_dim 600 is above 512"),
        ("triton", {"dtype": torch.float64}, "float64"),
        ("triton", {"alibi_slopes": torch.ones(4)}, "no gradient for alibi_slopes"),
        ("cuda", {"width": 264}, "head_dim 264 is above 256"),
        ("cuda", {"dtype": torch.float32}, "float16 and bfloat16, not in torch.float32"),
        ("cuda", {"alibi_slopes": torch.ones(4)}, "no gradient for alibi_slopes"),
        ("cuda", {"bias": torch.ones(5, 7)}, "no gradient for bias"),
        ("gluon", {"width": 264}, "head_dim 264 is above 256"),
        ("gluon", {"width": 20}, "head_dim in steps of 8"),
        ("gluon", {"dtype": torch.float32}, "float16 and bfloat16, not in torch.float32"),
        ("gluon", {"alibi_slopes": torch.ones(4)}, "no gradient for alibi_slopes"),
        ("gluon", {"bias": torch.ones(5, 7)}, "no bias"),
    ],
)
def test_what_kernels_decline(
    backend: str, options: dict[str, Any], reason: str, device: str
) -> None:
    options = {"width": 8, "dtype": widest(backend)} | options
    width, dtype = options.pop("width"), options.pop("dtype")
    features = {name: x.to(device).requires_grad_() for name, x in options.items()}
    q = torch.randn(2, 5, 4, width, dtype=dtype, device=device)
    k = torch.randn(2, 7, 2, width, dtype=dtype, device=device)
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        fastattn.attention(q, k, k, **features, backend=backend)
    fastattn.attention(q, k, k, **features)  # left open, another backend takes it


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = fastattn.explain(fastattn.attention, **tensors(), causal=True, return_lse=True)
    assert capsys.readouterr().out.strip() == str(explanation)
    assert explanation.backend == "torch"
    assert set(explanation.reasons) == set(backends.NAMES)
    assert all(explanation.reasons[name] for name in ("gluon", "cuda", "triton", "reference"))
    arguments = tensors()
    arguments["q"].requires_grad_()
    explanation = fastattn.explain(fastattn.attention, **arguments, return_lse=True)
    assert explanation.backend == "reference"
    assert "drops the gradient of the LSE" in str(explanation.reasons["torch"])
    with pytest.raises(ValueError, match="function must be an op of fastattn"):
        fastattn.explain(torch.relu, arguments["q"])
    with pytest.raises(ValueError, match="k must have q's batch size"):
        fastattn.explain(fastattn.attention, **tensors(k=torch.randn(3, 7, 2, 8)))


def registered(extras: Extras, **settings: Any) -> tuple[Any, ...]:
    """What follows q, k and v in a call of the registered op."""
    numbers = Settings(-1, 0, False, 0.3, 0.0, 0.0, "ieee", 0, 0, 0, 0)._replace(**settings)
    return (*extras, *numbers, "triton", True)


CALLS: dict[str, Any] = {
    "plain": lambda: registered(Extras()),
    "features": lambda: registered(
        Extras(
            mask=torch.rand(2, 1, 5, 7) > 0.3,
            bias=torch.randn(1, 4, 5, 7, requires_grad=True),
            alibi_slopes=torch.rand(1, 4),
            sink=torch.randn(4, requires_grad=True),
            key_lengths=torch.tensor([7, 3]),
            q_documents=torch.randint(2, (2, 5)),
            k_documents=torch.randint(2, (2, 7)),
            dropout_seed=torch.tensor([5]),
        ),
        window_left=4, softcap=3.0, dropout_p=0.2,
    ),
    "blocks": lambda: registered(
        Extras(blocks=fastattn.BlockMask.from_predicate(lambda b, h, i, j: i + j < 9, 1, 1, 5, 7, block_size=16).tensors),
        block_q=16, block_k=16,
    ),
}  # fmt: skip


def moved(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    def move(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.detach().to(device).requires_grad_(x.requires_grad)
        return [move(y) for y in x] if isinstance(x, tuple) else x

    return tuple(map(move, arguments))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n == "features")) for n in CALLS]
)
def test_opcheck(name: str, device: str) -> None:
    q = torch.randn(2, 5, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 7, 2, 8, requires_grad=True), torch.randn(2, 7, 2, 6, requires_grad=True)
    arguments = moved((q, k, v, *CALLS[name]()), device)
    laws.opcheck(torch.ops.fastattn.attention, *arguments)
    out, lse = torch.ops.fastattn.attention(*arguments)
    wanted = name == "features"
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, [wanted] * 2, *arguments)
    backward = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in backward)
    laws.opcheck(torch.ops.fastattn.attention_backward, *backward)


def test_opcheck_packed(device: str) -> None:
    q, k = torch.randn(9, 4, 8, requires_grad=True), torch.randn(12, 2, 8, requires_grad=True)
    cu_q, cu_k = torch.tensor([0, 4, 9]), torch.tensor([0, 7, 12])
    extras = Extras(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=torch.tensor([3, 5]))
    call = registered(extras, max_seqlen_q=5, max_seqlen_k=7)
    arguments = moved((q, k, k.detach().clone().requires_grad_(), *call), device)
    laws.opcheck(torch.ops.fastattn.attention, *arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_with_features(backend: str, device: str) -> None:
    """The gradient of a bias, and a window: one graph for all lengths."""
    made = {"dtype": widest(backend), "device": device}

    def step(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, k, bias=bias, window=(3, 2), backend=backend).square().sum()

    def draw(n: int) -> tuple[torch.Tensor, ...]:
        q = torch.randn(2, n, 4, 8, **made, requires_grad=True)
        k = torch.randn(2, 2 * n - 1, 2, 8, **made, requires_grad=True)
        return q, k, torch.randn(4, n, 2 * n - 1, **made, requires_grad=backend != "cuda")

    laws.one_graph(step, draw, frames=None)


@pytest.mark.parametrize("backend", (None, "triton", "cuda"))
def test_compiles_packed(backend: str | None, device: str) -> None:
    torch._dynamo.reset()

    def step(q: torch.Tensor, cu: torch.Tensor, longest: int) -> torch.Tensor:
        return fastattn.attention_varlen(
            q, q, q, cu, cu, longest, longest, causal=True, softcap=4.0, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 4), (7, 1, 2)):
        cu = torch.tensor([0, *lengths], device=device).cumsum(0)
        q = torch.randn(sum(lengths), 2, 8, dtype=widest(backend), device=device)
        torch.testing.assert_close(compiled(q, cu, max(lengths)), step(q, cu, max(lengths)))


@pytest.mark.parametrize("backend", (pytest.param("triton", marks=pytest.mark.long), "cuda"))
@pytest.mark.parametrize("dynamic", (None, pytest.param(True, marks=pytest.mark.long)))
def test_compiles_packed_of_unknown_lengths(
    dynamic: bool | None, backend: str, device: str
) -> None:
    """The longest sequence is a number that the graph reads, and the kernels have a limit of it."""
    torch._dynamo.reset()

    def step(q: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return fastattn.attention_varlen(q, q, q, cu, cu, causal=True, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((3, 4), (7, 1, 2)):
        cu = torch.tensor([0, *lengths], device=device).cumsum(0)
        q = torch.randn(sum(lengths), 2, 8, dtype=widest(backend), device=device)
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            out = compiled(q, cu)
        torch.testing.assert_close(out, step(q, cu))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    made = {"dtype": widest(backend), "device": device, "requires_grad": True}

    def step(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, k, causal=True, backend=backend).square().sum()

    def draw(n: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(2, n, 4, 8, **made), torch.randn(2, 2 * n - 1, 2, 8, **made)

    laws.one_graph(step, draw, frames=None)


def test_compiles_with_the_default_choice() -> None:
    torch._dynamo.reset()
    q = torch.randn(2, 6, 4, 8)
    lengths = torch.tensor([3, 6])
    compiled = torch.compile(fastattn.attention, fullgraph=True, backend="aot_eager")
    for options in ({}, {"causal": True}, {"key_lengths": lengths}, {"return_lse": True}):
        torch.testing.assert_close(
            compiled(q, q, q, **options), fastattn.attention(q, q, q, **options)
        )


@pytest.mark.parametrize("backend", (None, "reference"))
def test_functional_transforms(backend: str | None) -> None:
    q, k, v = (torch.randn(2, 5, 2, 4, dtype=torch.float64) for _ in range(3))

    def formula(q: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
        p = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    laws.functional_transforms(
        lambda q: fastattn.attention(q, k, v, causal=True, backend=backend), formula, q
    )


@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_kernels_refuse_transforms(backend: str, device: str) -> None:
    q = torch.randn(1, 5, 2, 8, dtype=widest(backend), device=device)
    laws.kernels_refuse_transforms(lambda x: fastattn.attention(x, q, q, backend=backend), q)


FEATURES: dict[str, Any] = {
    "softcap, alibi": lambda: {"softcap": 2.0, "alibi_slopes": torch.rand(2, dtype=torch.float64)},
    "window": lambda: {"window": (1, 1)},
    "top_left": lambda: {"causal": "top_left"},
    "documents": lambda: {
        "document_ids": (torch.tensor([[0, 1, 2]]), torch.tensor([[0, 0, 1, 1, 3]]))
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_derivatives_with_features(name: str) -> None:
    """First, second and forward-mode derivatives by the default choice, bias and sink included."""
    q = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 5, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    options = FEATURES[name]()

    def function(*x: torch.Tensor) -> Any:
        q, k, v, bias, sink = x
        return fastattn.attention(q, k, v, bias=bias, sink=sink, return_lse=True, **options)

    leaves = (q, k, v, bias, sink)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_derivatives_of_packed_sequences() -> None:
    q, k, v = (torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6))
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.attention_varlen(q, k, v, cu_q, cu_k, 3, 4, causal=True)

    assert torch.autograd.gradcheck(function, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v))
    batch = torch.stack([q.detach(), q.detach() * 2])
    together = torch.func.vmap(lambda x: function(x, k.detach(), v.detach()))(batch)
    torch.testing.assert_close(together[1], function(batch[1], k.detach(), v.detach()))


def test_second_derivative_of_the_reference() -> None:
    q = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 1, 3, 5) > 0.3
    mask[:, :, 0] = False  # a row without a key

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = fastattn.attention(
            q, k, v, causal=True, mask=mask, return_lse=True, backend="reference"
        )
        return out, lse[:, :, 1:]

    assert torch.autograd.gradcheck(function, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v))


def test_second_derivative_of_bias_and_sink_through_the_kernels(device: str) -> None:
    def on(backend: str) -> Any:
        options: dict[str, Any] = {"softcap": 3.0, "window": (2, 0), "return_lse": True}
        return lambda q, k, v, bias, sink: fastattn.attention(
            q, k, v, bias=bias, sink=sink, **options, backend=backend
        )

    def normal(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape, device=device) for shape in shapes]

    inputs = normal(*[(1, 5, 2, 8)] * 3, (2, 5, 5), (2,))
    laws.second_derivative(on("triton"), on("reference"), inputs, normal((1, 5, 2, 8), (1, 2, 5)))


@pytest.mark.parametrize("backend", ("reference", "triton", "cuda"))
def test_gradients_of_one_output_alone(backend: str, device: str) -> None:
    """Only the LSE used, or only some inputs wanting gradients."""
    q = torch.randn(1, 5, 2, 8, dtype=widest(backend), device=device, requires_grad=True)
    k = torch.randn(1, 7, 2, 8, dtype=widest(backend), device=device)
    _, lse = fastattn.attention(q, k, k, return_lse=True, backend=backend)
    (grad,) = torch.autograd.grad(lse.sum(), q)
    exact = q.detach().double().requires_grad_()
    scores = torch.einsum("bihd,bjhd->bhij", exact, k.double()) / 8**0.5
    assert_near(grad, torch.autograd.grad(torch.logsumexp(scores, -1).sum(), exact)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
def test_captured_by_a_cuda_graph() -> None:
    """Lengths are tensors: one capture serves every length."""
    q = torch.randn(3, 1, 4, 64, device="cuda", dtype=torch.float16)
    k = torch.randn(3, 256, 2, 64, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([1, 2, 3], device="cuda", dtype=torch.int32)
    fastattn.attention(q, k, k, key_lengths=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention(q, k, k, key_lengths=lengths)
    for step in (1, 100, 253):
        lengths.copy_(torch.tensor([1, 2, 3], device="cuda") + step - 1)
        graph.replay()
        torch.testing.assert_close(out, fastattn.attention(q, k, k, key_lengths=lengths))
