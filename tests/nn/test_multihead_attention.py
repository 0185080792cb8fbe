"""MultiheadAttention against torch's: forward, self_attention, and life inside torch's layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn.compare import LowRank, assert_module_close
from torch.nn.utils import parametrizations, prune

from fastattn.nn import KeyValueCache, MultiheadAttention
from fastattn.nn import multihead_attention as attention_module

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BATCH, HEADS, EMBED, QUERIES, KEYS = 3, 4, 24, 5, 7


def _pair(*args: Any, **kwargs: Any) -> tuple[MultiheadAttention, torch.nn.MultiheadAttention]:
    """Ours and torch's with the same random weights, biases included."""
    ours = MultiheadAttention(*(args or (EMBED, HEADS)), **kwargs)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = torch.nn.MultiheadAttention(*(args or (EMBED, HEADS)), **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _hidden(*shape: int) -> torch.Tensor:
    """A random boolean mask in torch's sense (True hides) that leaves every row its first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def _added(*shape: int) -> torch.Tensor:
    """A random additive mask that hides a few keys and leaves every row its first."""
    return torch.randn(shape).bfloat16().float().masked_fill(_hidden(*shape), -torch.inf)


def _causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _input(length: int, features: int = EMBED, *, batch_first: bool = True) -> torch.Tensor:
    shape = (BATCH, length, features) if batch_first else (length, BATCH, features)
    return torch.randn(shape)


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    """The arguments of every call of the fused op."""
    calls: list[tuple[tuple, dict]] = []
    original = attention_module.attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(attention_module, "attention", spy)
    return calls


# --- forward, on the fused op -------------------------------------------------------------------

MASKS = (
    *("no mask", "2-D", "3-D", "padding", "2-D and padding", "3-D and padding"),
    *("additive 2-D", "additive 3-D", "additive padding"),
    *("additive 2-D and padding", "additive 3-D and padding"),
)


def _masks(mask: str, queries: int, keys: int) -> dict[str, torch.Tensor]:
    """The arguments that a name of MASKS stands for."""
    draw = _added if "additive" in mask else _hidden
    masks = {}
    if "-D" in mask:
        masks["attn_mask"] = draw(*[BATCH * HEADS] * ("3-D" in mask), queries, keys)
    if "padding" in mask:
        masks["key_padding_mask"] = draw(BATCH, keys)
    return masks


def _called(masks: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """How a module is called with `masks`, in the dtype of its parameters."""

    def call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = inputs if len(inputs) == 3 else inputs * 3
        given = {  # additive masks as torch wants them: in the inputs' dtype
            name: x.to(q.dtype) if torch.is_tensor(x) and x.is_floating_point() else x
            for name, x in masks.items()
        }
        return module(q, k, v, need_weights=False, **given)[0]

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_cross_attention(mask: str, batch_first: bool, dtype: torch.dtype, op_calls: list) -> None:
    ours, theirs = _pair(batch_first=batch_first, dtype=dtype)
    masks = _masks(mask, QUERIES, KEYS)
    inputs = [_input(n, batch_first=batch_first).to(dtype) for n in (QUERIES, KEYS, KEYS)]
    assert_module_close(ours, theirs, *inputs, call=_called(masks))
    assert len(op_calls) == 1, "ours must run on the fused op"


def _square() -> torch.Tensor:
    """As torch.nn.Transformer makes it; the hint spares it."""
    return torch.nn.Transformer.generate_square_subsequent_mask(QUERIES)


CAUSAL: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"attn_mask": _causal(QUERIES), "is_causal": True},
    "causal float": lambda: {"attn_mask": _square(), "is_causal": True},
    "causal and padding": lambda: {
        "attn_mask": _causal(QUERIES),
        "is_causal": True,
        "key_padding_mask": _hidden(BATCH, QUERIES),
    },
    "causal float and float padding": lambda: {
        "attn_mask": _square(),
        "is_causal": True,
        "key_padding_mask": _added(BATCH, QUERIES),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", [*MASKS, *CAUSAL])
def test_self_attention_through_forward(
    mask: str, batch_first: bool, dtype: torch.dtype, op_calls: list
) -> None:
    masks = CAUSAL[mask]() if mask in CAUSAL else _masks(mask, QUERIES, QUERIES)
    ours, theirs = _pair(batch_first=batch_first, dtype=dtype)
    x = _input(QUERIES, batch_first=batch_first).to(dtype)
    assert_module_close(ours, theirs, x, call=_called(masks))
    ((_, kwargs),) = op_calls
    assert kwargs["causal"] == ("top_left" if mask in ("causal", "causal float") else False)


@pytest.mark.parametrize(("queries", "keys"), [(QUERIES, KEYS), (KEYS, QUERIES)])
def test_causal_over_different_lengths(queries: int, keys: int, op_calls: list) -> None:
    """torch's hint is aligned to the first key."""
    ours, theirs = _pair(batch_first=True)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    call = _called({"attn_mask": hidden, "is_causal": True})
    inputs = [_input(n) for n in (queries, keys, keys)]
    assert_module_close(ours, theirs, *inputs, call=call)
    ((_, kwargs),) = op_calls
    assert kwargs["mask"] is None


def test_a_boolean_mask_with_an_additive_one(op_calls: list) -> None:
    """Which torch deprecates, for it makes one additive mask of both; here none is expanded."""
    ours, _ = _pair(batch_first=True)
    x = _input(QUERIES)
    added, hidden = _added(BATCH * HEADS, QUERIES, QUERIES), _hidden(BATCH, QUERIES)
    found, _ = ours(x, x, x, attn_mask=added, key_padding_mask=hidden, need_weights=False)
    as_added = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    expected, _ = ours(x, x, x, attn_mask=added, key_padding_mask=as_added, need_weights=False)
    torch.testing.assert_close(found, expected)
    (_, first), (_, second) = op_calls
    assert first["mask"].shape == (BATCH, 1, 1, QUERIES)
    assert first["bias"].shape == (BATCH, HEADS, QUERIES, QUERIES)
    assert second["mask"] is None


def test_the_gradient_of_an_additive_mask() -> None:
    ours, theirs = _pair(batch_first=True, dtype=torch.float64)
    x = _input(QUERIES).double()
    masks = [
        torch.randn(BATCH * HEADS, QUERIES, QUERIES, dtype=torch.float64),
        torch.randn(BATCH, QUERIES, dtype=torch.float64),
    ]
    grads = []
    for module in (ours, theirs):
        attn_mask, padding = (m.clone().requires_grad_() for m in masks)
        out, _ = module(x, x, x, padding, need_weights=False, attn_mask=attn_mask)
        grads.append(torch.autograd.grad(out.square().sum(), (attn_mask, padding)))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, {"kdim": 10}, {"vdim": 6}, {"kdim": 10, "vdim": 6}, {"kdim": EMBED}]
)
def test_other_sizes_of_key_and_value(sizes: dict[str, int], bias: bool, op_calls: list) -> None:
    ours, theirs = _pair(bias=bias, batch_first=True, **sizes)
    query = _input(QUERIES)
    key, value = _input(KEYS, ours.kdim), _input(KEYS, ours.vdim)
    assert_module_close(
        ours, theirs, query, key, value, call=lambda m, q, k, v: m(q, k, v, need_weights=False)[0]
    )
    assert len(op_calls) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_key_that_is_value(bias: bool, op_calls: list) -> None:
    ours, theirs = _pair(bias=bias)
    query, memory = _input(QUERIES, batch_first=False), _input(KEYS, batch_first=False)
    assert_module_close(
        ours, theirs, query, memory, call=lambda m, q, kv: m(q, kv, kv, need_weights=False)[0]
    )
    (_, k, v), _ = op_calls[0]
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr(), "one product for both"


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": _hidden(QUERIES, KEYS)},
        {"attn_mask": _hidden(HEADS, QUERIES, KEYS)},
        {"key_padding_mask": _hidden(KEYS)},
        {"key_padding_mask": _added(KEYS)},
        {"attn_mask": _added(HEADS, QUERIES, KEYS)},
    ],
    ids=["no mask", "2-D", "3-D", "padding", "additive padding", "additive 3-D"],
)
def test_unbatched(masks: dict, batch_first: bool, op_calls: list, device: str) -> None:
    ours, theirs = _pair(batch_first=batch_first)
    masks = {name: mask.to(device) for name, mask in masks.items()}
    query, key, value = (torch.randn(n, EMBED) for n in (QUERIES, KEYS, KEYS))

    assert_module_close(ours, theirs, query, key, value, call=_called(masks))
    assert len(op_calls) == 1
    assert ours(query, key, value, need_weights=False)[1] is None


@pytest.mark.parametrize("grad", [False, True])
def test_eval_mode(grad: bool, op_calls: list) -> None:
    """Without gradients torch takes its own inference path; ours gives the same."""
    ours, theirs = _pair(batch_first=True, dropout=0.5)
    x = _input(QUERIES)
    with torch.set_grad_enabled(grad):
        result, weights = ours.eval()(x, x, x, need_weights=False)
        expected, _ = theirs.eval()(x, x, x, need_weights=False)
    assert weights is None
    assert result.requires_grad == grad
    torch.testing.assert_close(result, expected)
    assert len(op_calls) == 1


def test_projections_reach_the_op_as_views(op_calls: list) -> None:
    ours, _ = _pair()
    x = _input(QUERIES, batch_first=False)
    ours(x, x, x, need_weights=False)
    ours.self_attention(x)
    for (q, k, v), _ in op_calls:
        assert q.shape[2:] == (HEADS, EMBED // HEADS)
        assert q.untyped_storage().nbytes() == 3 * x.numel() * x.element_size()
        assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1
        assert q.stride(-1) == 1


def test_masks_reach_the_op_unexpanded(op_calls: list) -> None:
    ours, _ = _pair(batch_first=True)
    x = _input(QUERIES)
    ours(x, x, x, key_padding_mask=_hidden(BATCH, QUERIES), need_weights=False)
    ours(x, x, x, attn_mask=_hidden(QUERIES, QUERIES), need_weights=False)
    shapes = [kwargs["mask"].shape for _, kwargs in op_calls]
    assert shapes == [(BATCH, 1, 1, QUERIES), (1, 1, QUERIES, QUERIES)]


@pytest.mark.parametrize("additive", [False, True])
def test_query_without_a_key_gives_the_bias_and_no_gradient(additive: bool) -> None:
    ours, _ = _pair(batch_first=True)
    x = _input(QUERIES).requires_grad_()
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1] = True
    if additive:
        padding = torch.zeros(BATCH, QUERIES).masked_fill(padding, -torch.inf)
    out, _ = ours(x, x, x, key_padding_mask=padding, need_weights=False)
    assert torch.equal(out[1], ours.out_proj.bias.expand(QUERIES, EMBED))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert grad[0].abs().min() > 0


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["forward", "self_attention"])
def test_dropout_in_training_alone(way: str) -> None:
    ours, _ = _pair(batch_first=True, dropout=0.5)
    x = torch.randn(1, 6, EMBED).expand(2000, 6, EMBED)

    def attend() -> torch.Tensor:
        if way == "forward":
            return ours(x, x, x, need_weights=False)[0]
        return ours.self_attention(x)

    with torch.no_grad():
        expected = ours.eval()(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(attend(), expected)
        ours.train()
        torch.manual_seed(11)
        first = attend()
        assert not torch.equal(attend(), first)
        torch.manual_seed(11)
        assert torch.equal(attend(), first)
    # Scaled by 1 / (1 - p), dropout leaves the mean where it was: here within five of its
    # standard errors.
    error = (first.mean(0) - expected[0]).abs()
    assert (error < 5 * first.std(0) / 2000**0.5 + 1e-6).all()
    assert first.std(0).min() > 0.01


# --- forward, left to torch ----------------------------------------------------------------------

LEFT_TO_TORCH: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], str]] = {
    "weights": ({}, lambda: {"need_weights": True}, "need_weights=True"),
    "weights per head": (
        {},
        lambda: {"need_weights": True, "average_attn_weights": False},
        "need_weights=True",
    ),
    "weights, causal": (
        {},
        lambda: {"need_weights": True, "attn_mask": _causal(QUERIES), "is_causal": True},
        "need_weights=True",
    ),
    "add_bias_kv": ({"add_bias_kv": True}, dict, "add_bias_kv"),
    "add_zero_attn": ({"add_zero_attn": True}, dict, "add_zero_attn"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_left_to_torch(case: str, training: bool, op_calls: list) -> None:
    options, make_arguments, reason = LEFT_TO_TORCH[case]
    ours, theirs = _pair(batch_first=True, **options)
    arguments = {"need_weights": False, **make_arguments()}
    x = _input(QUERIES)
    assert reason in str(ours.why_torch(x, x, x, **arguments))
    result, weights = ours.train(training)(x, x, x, **arguments)
    expected, expected_weights = theirs.train(training)(x, x, x, **arguments)
    assert torch.equal(result, expected)
    if arguments["need_weights"]:
        assert torch.equal(weights, expected_weights)
    else:
        assert weights is None
    assert not op_calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_to_torch(op_calls: list) -> None:
    ours, theirs = _pair(batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(n, EMBED) for n in (2, 5)])
    torch.set_default_device(None)  # torch's module takes nested tensors without one alone
    assert ours.why_torch(x, x, x, need_weights=False) == "nested tensors"
    with torch.no_grad():
        result, _ = ours.eval()(x, x, x, need_weights=False)
        expected, _ = theirs.eval()(x, x, x, need_weights=False)
    for ours_row, their_row in zip(result.unbind(), expected.unbind(), strict=True):
        assert torch.equal(ours_row, their_row)
    assert not op_calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_self_attention_refuses_nested_tensors(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.randn(n, EMBED) for n in (2, 5)], layout=layout)
    ours, _ = _pair(batch_first=True)
    with pytest.raises(TypeError, match=r"x is a nested tensor.*to_padded_tensor.*key_lengths"):
        ours.self_attention(x)


COMPUTED = {
    "pruned in": lambda m: prune.l1_unstructured(m, "in_proj_weight", 0.5),
    "pruned bias": lambda m: prune.l1_unstructured(m, "in_proj_bias", 0.5),
    "pruned out": lambda m: prune.l1_unstructured(m.out_proj, "weight", 0.5),
    "weight norm in": lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
    "weight norm out": lambda m: parametrizations.weight_norm(m.out_proj),
    "old weight norm": lambda m: torch.nn.utils.weight_norm(m, "in_proj_weight"),
    "spectral norm": lambda m: torch.nn.utils.spectral_norm(m, "in_proj_weight"),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize("way", ["forward", "self_attention"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_train(way: str, kind: str) -> None:
    """Pruned and normed weights of the packed projection: three steps as torch's module has them.

    (torch's forward reads a pruned out_proj.weight of before: there the step is that of weights
    that are computed again.)
    """
    x = torch.randn(2, 5, 16)
    losses: list[list[float]] = []
    for cls in (MultiheadAttention, torch.nn.MultiheadAttention):
        torch.manual_seed(0)
        module = cls(16, 2, batch_first=True)
        COMPUTED[kind](module)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        losses.append([])
        for _ in range(3):
            if cls is torch.nn.MultiheadAttention:
                for hook in module.out_proj._forward_pre_hooks.values():
                    hook(module.out_proj, ())
                out, _ = module(x, x, x, need_weights=False)
            elif way == "forward":
                out, _ = module(x, x, x, need_weights=False)
            else:
                out = module.self_attention(x)
            loss = out.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_weights(layout: str) -> None:
    ours = MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected, _ = ours(x, x, x, need_weights=False)
        ours.in_proj_weight = torch.nn.Parameter(getattr(ours.in_proj_weight, layout)())
        ours.out_proj.weight = torch.nn.Parameter(getattr(ours.out_proj.weight, layout)())
        torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], expected)
        torch.testing.assert_close(ours.self_attention(x), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_jit_trace() -> None:
    module = MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)

    class Attend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x, x, x, need_weights=False)[0] + self.module.self_attention(x)

    traced = torch.jit.trace(Attend(), (x,))
    torch.testing.assert_close(traced(x[:, :3]), Attend()(x[:, :3]))


# --- compile, autocast, hooks --------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["no mask", "3-D and padding", "additive 3-D and padding"])
def test_forward_compiles_without_a_graph_break(mask: str) -> None:
    ours, theirs = _pair(batch_first=True)
    call = _called(_masks(mask, QUERIES, QUERIES))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_module_close(ours, theirs, _input(QUERIES), call=compiled, call_theirs=call)


def test_self_attention_compiles_without_a_graph_break() -> None:
    ours, theirs = _pair(batch_first=True)
    lengths = torch.tensor([5, 1, 3])
    compiled = torch.compile(
        lambda m, x: m.self_attention(x, causal=True, key_lengths=lengths),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_module_close(
        ours, theirs, _input(QUERIES), call=compiled, call_theirs=_causal_with_lengths(lengths)
    )


@pytest.mark.parametrize("way", ["forward", "additive", "self_attention"])
def test_autocast(way: str, device: str) -> None:
    ours, theirs = _pair(batch_first=True)
    x = _input(QUERIES).requires_grad_()
    masks = {"attn_mask": _added(QUERIES, QUERIES).half()} if way == "additive" else {}
    with torch.autocast(device, torch.bfloat16):
        expected, _ = theirs(x, x, x, need_weights=False, **masks)
        if way == "self_attention":
            result = ours.self_attention(x)
        else:
            result, _ = ours(x, x, x, need_weights=False, **masks)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    result.float().sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32
    assert x.grad.isfinite().all()


def test_hooks_of_out_proj_fire_in_self_attention() -> None:
    ours, _ = _pair()
    x = _input(QUERIES)
    before = ours.self_attention(x)
    ours.out_proj.register_forward_hook(lambda m, args, out: 2 * out)
    assert torch.equal(ours.self_attention(x), 2 * before)


def test_wrapped_out_proj_runs_in_self_attention() -> None:
    ours, _ = _pair()
    x = _input(QUERIES)
    before = ours.self_attention(x)
    ours.out_proj = LowRank(ours.out_proj)
    assert not torch.allclose(ours.self_attention(x), before)
    torch.nn.init.zeros_(ours.out_proj.up.weight)
    assert torch.equal(ours.self_attention(x), before)


# --- self_attention ------------------------------------------------------------------------------


def _causal_with_lengths(
    lengths: torch.Tensor | None, causal: bool = True
) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
    """torch's module asked for the same by masks."""

    def call(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1]
        padding = None if lengths is None else torch.arange(size) >= lengths[:, None]
        mask = _causal(size) if causal else None
        return m(x, x, x, need_weights=False, attn_mask=mask, key_padding_mask=padding)[0]

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [5, 1, 3]])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_against_torch(
    causal: bool, lengths: list[int] | None, dtype: torch.dtype
) -> None:
    ours, theirs = _pair(batch_first=True, dtype=dtype)
    key_lengths = None if lengths is None else torch.tensor(lengths)
    assert_module_close(
        ours,
        theirs,
        _input(QUERIES).to(dtype),
        call=lambda m, x: m.self_attention(x, causal=causal, key_lengths=key_lengths),
        call_theirs=_causal_with_lengths(key_lengths, causal),
    )


def test_padding_may_hold_nan() -> None:
    ours, _ = _pair()
    x = _input(QUERIES)
    lengths = torch.tensor([5, 2, 3])
    padding = torch.arange(QUERIES) >= lengths[:, None]
    expected = ours.self_attention(x, key_lengths=lengths)
    poisoned = x.masked_fill(padding[..., None], float("nan"))
    dirty = ours.self_attention(poisoned, key_lengths=lengths)
    assert torch.equal(dirty[~padding], expected[~padding])


def test_softmax_scale() -> None:
    ours, theirs = _pair(batch_first=True)
    x = _input(QUERIES)
    with torch.no_grad():  # a factor of the queries is a factor of the scores
        theirs.in_proj_weight[:EMBED] *= 0.5
        theirs.in_proj_bias[:EMBED] *= 0.5
    scale = 0.5 * (EMBED // HEADS) ** -0.5
    expected, _ = theirs(x, x, x, need_weights=False)
    torch.testing.assert_close(ours.self_attention(x, softmax_scale=scale), expected)


def _cache(ours: MultiheadAttention, lengths: list[int]) -> KeyValueCache:
    """With room for 9 tokens; unused slots hold NaN."""
    keys, values = torch.full((2, len(lengths), 9, ours.num_heads, ours.head_dim), math.nan)
    return KeyValueCache(keys, values, torch.tensor(lengths))


@pytest.mark.parametrize("steps", [[1] * 7, [4, 1, 2], [7]])
def test_cache_gives_what_the_whole_sequence_gives(steps: list[int]) -> None:
    ours, _ = _pair()
    x = _input(KEYS)
    cache = _cache(ours, [0] * len(x))
    parts = []
    with torch.no_grad():
        for part in x.split(steps, 1):
            parts.append(ours.self_attention(part, causal=True, cache=cache))
            cache.lengths.add_(part.shape[1])
        torch.testing.assert_close(torch.cat(parts, 1), ours.self_attention(x, causal=True))


@torch.no_grad()
def test_cached_sequences_of_unequal_lengths() -> None:
    ours, _ = _pair()
    x, lengths = _input(KEYS), [7, 2, 4]
    cache = _cache(ours, [0] * 3)
    ours.self_attention(x, causal=True, cache=cache)
    cache.lengths.copy_(torch.tensor(lengths))
    new = _input(KEYS)[:, :2]
    together = ours.self_attention(new, causal=True, cache=cache)
    for b, n in enumerate(lengths):
        whole = torch.cat([x[b : b + 1, :n], new[b : b + 1]], 1)
        alone = ours.self_attention(whole, causal=True)[:, n:]
        torch.testing.assert_close(together[b : b + 1], alone)


def test_a_cache_is_for_inference() -> None:
    ours, _ = _pair()
    x = _input(KEYS)
    with pytest.raises(ValueError, match=r"call it under torch.no_grad\(\)"):
        ours.self_attention(x, cache=_cache(ours, [0] * 3))
    with torch.no_grad():
        with pytest.raises(ValueError, match="key_lengths must be None with a cache"):
            lengths = torch.tensor([7, 2, 4])
            ours.self_attention(x, key_lengths=lengths, cache=_cache(ours, [0] * 3))
        ours.dropout = 0.5
        with pytest.raises(ValueError, match=r"dropout=0.5 in training mode: call eval\(\) first"):
            ours.train().self_attention(x, cache=_cache(ours, [0] * 3))


# --- inside torch's layers -----------------------------------------------------------------------


def _swap(layer: torch.nn.Module) -> torch.nn.Module:
    """A copy of a layer of torch's whose attention is ours, by class swap."""
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
    return layer


ENCODER_MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "no mask": dict,
    "causal": lambda: {"src_mask": _square(), "is_causal": True},
    "boolean": lambda: {"src_mask": _causal(QUERIES)},
    "padding": lambda: {
        "src_key_padding_mask": torch.arange(QUERIES) >= torch.tensor([[5], [1], [3]])
    },
}


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", ENCODER_MASKS)
def test_inside_torchs_encoder_layer(
    mask: str, norm_first: bool, mode: str, op_calls: list
) -> None:
    theirs = torch.nn.TransformerEncoderLayer(
        EMBED, HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    ).train(mode == "train")
    ours = _swap(theirs)
    masks = ENCODER_MASKS[mask]()
    x = _input(QUERIES)
    if mode == "inference":  # torch's fast path may read the weights and not call the module
        with torch.inference_mode():
            torch.testing.assert_close(ours(x, **masks), theirs(x, **masks))
    else:
        assert_module_close(ours, theirs, x, call=lambda m, x: m(x, **masks))
        assert len(op_calls) == 1


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "positive multiple of num_heads, got embed_dim=24 and num_heads=5"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": -4}, "num_heads=-4"),
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -1e-9}, "dropout must be"),
    ],
)
def test_constructor_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **arguments})


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("query", "key", "value", "masks", "message"),
    [
        ((3, 5, 20), (3, 7, 24), (3, 7, 24), {}, r"query must .* \(batch, seqlen, 24\)"),
        ((3, 5, 24), (3, 7, 25), (3, 7, 24), {}, r"key must .* got \(3, 7, 25\)"),
        ((3, 5, 24), (3, 7, 24), (7,), {}, r"value must .* got \(7,\)"),
        ((1, 3, 5, 24), (3, 7, 24), (3, 7, 24), {}, "query must"),
        ((2, 5, 24), (3, 7, 24), (3, 7, 24), {}, "one batch size"),
        ((3, 5, 24), (3, 7, 24), (3, 6, 24), {}, "one length"),
        ((5, 24), (1, 7, 24), (1, 7, 24), {}, "one batch size"),
        ((3, 5, 24), (7, 24), (7, 24), {}, "one batch size"),
        ((3, 5, 24), (3, 5, 24), (3, 5, 24), {"is_causal": True}, "hint about attn_mask"),
        ((3, 5, 24), (3, 7, 24), (3, 7, 24), {"attn_mask": (7, 5)}, r"the shape \(5, 7\) or"),
        ((3, 5, 24), (3, 7, 24), (3, 7, 24), {"attn_mask": (3, 5, 7)}, r"or \(12, 5, 7\), got"),
        ((3, 5, 24), (3, 7, 24), (3, 7, 24), {"attn_mask": (7,)}, "attn_mask must"),
        ((3, 5, 24), (3, 7, 24), (3, 7, 24), {"key_padding_mask": (7, 3)}, r"the shape \(3, 7\)"),
        ((5, 24), (7, 24), (7, 24), {"key_padding_mask": (1, 7)}, r"the shape \(7,\)"),
        (
            (3, 5, 24),
            (3, 5, 24),
            (3, 5, 24),
            {"attn_mask": (5,), "is_causal": True},
            "attn_mask must",
        ),
    ],
)
def test_forward_refuses(
    query: tuple, key: tuple, value: tuple, masks: dict[str, Any], message: str
) -> None:
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True)
    masks = {
        name: _zeros(*mask, dtype=torch.bool) if isinstance(mask, tuple) else mask
        for name, mask in masks.items()
    }
    with pytest.raises(ValueError, match=message):
        ours(_zeros(*query), _zeros(*key), _zeros(*value), need_weights=False, **masks)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_forward_refuses_masks_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True)
    mask = _zeros(5, 5, dtype=dtype) if name == "attn_mask" else _zeros(3, 5, dtype=dtype)
    x = _zeros(3, 5, EMBED)
    with pytest.raises(TypeError, match=f"{name} must be boolean .* float32 .* got {dtype}"):
        ours(x, x, x, need_weights=False, **{name: mask})


def test_errors_name_the_layout_without_batch_first() -> None:
    ours = MultiheadAttention(EMBED, HEADS)
    with pytest.raises(ValueError, match=r"query must have the shape \(seqlen, batch, 24\)"):
        ours(_zeros(5, 3, 2), _zeros(7, 3, 24), _zeros(7, 3, 24), need_weights=False)
    with pytest.raises(ValueError, match="batch_first=False"):
        ours(_zeros(5, 3, 24), _zeros(7, 2, 24), _zeros(7, 2, 24), need_weights=False)


@pytest.mark.parametrize(
    "options", [{"kdim": 8}, {"vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_self_attention_refuses_other_modules(options: dict) -> None:
    with pytest.raises(ValueError, match="self_attention needs a module without kdim"):
        MultiheadAttention(EMBED, HEADS, **options).self_attention(_input(QUERIES))


@pytest.mark.parametrize("shape", [(5, 24), (3, 5, 20), (1, 3, 5, 24)])
def test_self_attention_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have the shape \(batch, seqlen, 24\), got"):
        MultiheadAttention(EMBED, HEADS).self_attention(_zeros(*shape))
