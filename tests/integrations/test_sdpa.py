"""F.scaled_dot_product_attention on fastattn: the function, the override, PyTorch's registry."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.bias
import torch.nn.functional as F

import fastattn
from fastattn.integrations import sdpa
from fastattn.integrations.sdpa import override_sdpa, register, scaled_dot_product_attention
from fastattn.integrations.sdpa_flash import BACKWARD, FORWARD, NAME, Implementation
from oracle import assert_close_to_reference

ORIGINAL = F.scaled_dot_product_attention
Arguments = dict[str, Any]
Shape = tuple[int, ...]


def run(
    function: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor],
    arguments: Arguments,
    grad_out: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | None]:
    """Output and gradients, of a floating-point attn_mask too."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    mask = arguments.get("attn_mask")
    names = ["query", "key", "value"]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().clone().requires_grad_()
        arguments = {**arguments, "attn_mask": mask}
        leaves, names = [*leaves, mask], [*names, "attn_mask"]
    out = function(*leaves[:3], **arguments)
    if out.numel():
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))
    found = {f"gradient of {name}": x.grad for name, x in zip(names, leaves, strict=True)}
    return {"out": out.detach(), **found}


def assert_as_torch(tensors: list[torch.Tensor], arguments: Arguments) -> None:
    ours = run(scaled_dot_product_attention, tensors, arguments)
    theirs = run(ORIGINAL, tensors, arguments)
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def on_reference() -> Iterator[None]:
    """The definition computes, so that nothing but it and the translation is compared."""
    with fastattn.use_backend("reference"):
        yield


def doubles(device: str, *shapes: Shape) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]


SHAPES: dict[str, tuple[Shape, Shape, Shape, Arguments]] = {
    "2-D": ((5, 8), (7, 8), (7, 8), {}),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 8), {}),
    "4-D": ((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {}),
    "5-D": ((4, 3, 2, 5, 8), (4, 3, 2, 7, 8), (4, 3, 2, 7, 8), {}),
    "6-D": ((2, 1, 3, 2, 5, 8), (2, 1, 3, 2, 7, 8), (2, 1, 3, 2, 7, 8), {}),
    "other head_dim of value": ((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 4), {}),
    "batch of key and value broadcast": ((3, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {}),
    "batch of query broadcast": ((1, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {}),
    "batch of value alone broadcast": ((3, 2, 5, 8), (3, 2, 7, 8), (1, 2, 7, 8), {}),
    "batch of value alone not broadcast": ((1, 2, 5, 8), (1, 2, 7, 8), (3, 2, 7, 8), {}),
    "one head of key and value": ((3, 4, 5, 8), (3, 1, 7, 8), (3, 1, 7, 8), {}),
    "one head of key": ((3, 4, 5, 8), (3, 1, 7, 8), (3, 4, 7, 8), {}),
    "one head of query": ((3, 1, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), {}),
    "one head of query and key": ((3, 1, 5, 8), (3, 1, 7, 8), (3, 4, 7, 8), {}),
    "3-D broadcast": ((3, 5, 8), (1, 7, 8), (1, 7, 8), {}),
    "4-D query, 3-D key": ((3, 2, 5, 8), (2, 7, 8), (2, 7, 8), {}),
    "4-D query, 2-D key": ((3, 2, 5, 8), (7, 8), (7, 8), {}),
    "2-D query, 3-D key": ((5, 8), (3, 7, 8), (3, 7, 8), {}),
    "5-D, each broadcast elsewhere": ((4, 3, 2, 5, 8), (1, 3, 1, 7, 8), (4, 1, 2, 7, 8), {}),
    "grouped heads": ((3, 4, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"enable_gqa": True}),
    "grouped, 3-D": ((4, 5, 8), (2, 7, 8), (2, 7, 8), {"enable_gqa": True}),
    "grouped, 5-D": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8), {"enable_gqa": True}),
    "grouped, equal heads": ((3, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), {"enable_gqa": True}),
    "grouped, batch broadcast": ((3, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"enable_gqa": True}),
    "grouped, key 2, value 4": ((3, 4, 5, 8), (3, 2, 7, 8), (3, 4, 7, 8), {"enable_gqa": True}),
    "grouped, key 2, value 3": ((1, 12, 5, 8), (1, 2, 7, 8), (1, 3, 7, 8), {"enable_gqa": True}),
    "grouped, key 1, value 4": ((3, 4, 5, 8), (3, 1, 7, 8), (3, 4, 7, 8), {"enable_gqa": True}),
    "causal": ((3, 2, 6, 8), (3, 2, 6, 8), (3, 2, 6, 8), {"is_causal": True}),
    "causal, more keys": ((3, 2, 3, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"is_causal": True}),
    "causal, more queries": ((3, 2, 7, 8), (3, 2, 3, 8), (3, 2, 3, 8), {"is_causal": True}),
    "causal, one query": ((3, 2, 1, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"is_causal": True}),
    "causal, grouped, 5-D": (
        (2, 1, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8), {"is_causal": True, "enable_gqa": True},
    ),
    "scale": ((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"scale": 0.3}),
    "negative scale": ((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"scale": -1.0}),
    "scale 0": ((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"scale": 0}),
    "scale as a tensor": ((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"scale": torch.tensor(0.3)}),
    "every weight dropped": ((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8), {"dropout_p": 1.0}),
    "no keys": ((3, 2, 5, 8), (3, 2, 0, 8), (3, 2, 0, 8), {}),
    "no queries": ((3, 2, 0, 8), (3, 2, 7, 8), (3, 2, 7, 8), {}),
    "no batch": ((0, 2, 5, 8), (0, 2, 7, 8), (0, 2, 7, 8), {}),
    "no batch, 5-D": ((0, 3, 2, 5, 8), (0, 3, 2, 7, 8), (0, 3, 2, 7, 8), {}),
}  # fmt: skip


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_as_torch(case: str, device: str) -> None:
    *shapes, arguments = SHAPES[case]
    assert_as_torch(doubles(device, *shapes), arguments)


# Scores are (3, 2, 5, 7), or what stands in front.
MASKS: dict[str, tuple[Shape, Shape]] = {
    "scores": ((5, 7), (3, 2)),
    "keys": ((1, 7), (3, 2)),
    "queries": ((5, 1), (3, 2)),
    "one number": ((1, 1), (3, 2)),
    "heads": ((2, 5, 7), (3, 2)),
    "batch": ((3, 1, 5, 7), (3, 2)),
    "batch of one, heads": ((1, 2, 5, 7), (3, 2)),
    "padding": ((3, 1, 1, 7), (3, 2)),
    "whole": ((3, 2, 5, 7), (3, 2)),
    "2-D inputs": ((5, 7), ()),
    "3-D inputs": ((2, 5, 7), (2,)),
    "3-D inputs, shared": ((5, 7), (2,)),
    "5-D inputs, shared": ((5, 7), (4, 3, 2)),
    "5-D inputs, heads": ((2, 5, 7), (4, 3, 2)),
    "5-D inputs, outer batch": ((4, 1, 2, 5, 7), (4, 3, 2)),
    "5-D inputs, inner batch": ((3, 1, 5, 7), (4, 3, 2)),
    "5-D inputs, ones": ((1, 1, 1, 5, 7), (4, 3, 2)),
}


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("kind", ["boolean", "float64", "float32"])
@pytest.mark.parametrize("case", MASKS)
def test_masks_as_torch(case: str, kind: str, device: str) -> None:
    mask_shape, front = MASKS[case]
    tensors = doubles(device, (*front, 5, 8), (*front, 7, 8), (*front, 7, 8))
    if kind == "boolean":
        mask = torch.rand(mask_shape, device=device) < 0.6
        mask[..., 0] = True
    else:
        mask = torch.randn(mask_shape, dtype=getattr(torch, kind), device=device)
    ours = run(scaled_dot_product_attention, tensors, {"attn_mask": mask})
    wide = mask if kind == "boolean" else mask.double()
    theirs = run(ORIGINAL, tensors, {"attn_mask": wide})
    for name, expected in theirs.items():
        assert expected is not None
        found = ours[name]
        assert found is not None, name
        rough = name == "gradient of attn_mask" and kind == "float32"  # rounded to the mask's dtype
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if rough else {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(found.double(), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive", "grouped"])
def test_the_default_backend_in_every_dtype(kind: str, dtype: torch.dtype, device: str) -> None:
    heads = 2 if kind == "grouped" else 4
    arguments: Arguments = {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": (torch.rand(5, 7, device=device) < 0.6).index_fill(
            1, torch.zeros(1, dtype=torch.int64, device=device), True)},
        "additive": {"attn_mask": torch.randn(3, 1, 5, 7, device=device).to(dtype)},
        "grouped": {"enable_gqa": True},
    }[kind]  # fmt: skip
    tensors = [
        x.to(dtype) for x in doubles(device, (3, 4, 5, 8), (3, heads, 7, 8), (3, heads, 7, 8))
    ]
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    ours = run(scaled_dot_product_attention, tensors, arguments)
    eager = run(plain, tensors, arguments)
    reference = run(plain, [x.double() for x in tensors], wide)
    for name, found in ours.items():
        assert found is not None, name
        assert_close_to_reference(found, eager[name], reference[name], name=name, terms=1.0)


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The formula."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("additive", [False, True])
def test_a_query_that_sees_no_key_gives_zero(additive: bool, device: str) -> None:
    tensors = doubles(device, (3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8))
    mask = torch.ones(5, 7, dtype=torch.bool, device=device)
    mask[1] = False
    given = torch.zeros(5, 7, dtype=torch.float64, device=device).masked_fill(~mask, -torch.inf)
    found = run(scaled_dot_product_attention, tensors, {"attn_mask": given if additive else mask})
    assert all(x is not None and not x.isnan().any() for x in found.values())
    for name in ("out", "gradient of query"):
        assert torch.equal(found[name][:, :, 1], torch.zeros_like(found[name][:, :, 1]))
        assert found[name][:, :, 0].abs().min() > 0


def test_nothing_is_copied_on_the_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.Tensor, ...]] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        given = [kwargs["mask"], kwargs["bias"]]
        calls.append((q, k, v, *(x for x in given if x is not None)))
        return fastattn.attention(q, k, v, **kwargs)

    monkeypatch.setattr(sdpa, "attention", spy)
    for shapes, mask_shape in (
        ([(5, 8), (7, 8), (7, 8)], (5, 7)),
        ([(3, 5, 8), (3, 7, 8), (3, 7, 8)], (3, 1, 7)),
        ([(3, 4, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8)], (3, 1, 1, 7)),
        ([(2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (1, 1, 4, 7, 8)], (1, 1, 4, 5, 7)),
    ):
        tensors = [torch.randn(s, device=device) for s in shapes]
        mask = torch.zeros(mask_shape, device=device)
        scaled_dot_product_attention(*tensors, mask)
        for given, reached in zip([*tensors, mask], calls.pop(), strict=True):
            assert reached.data_ptr() == given.data_ptr()
            assert reached.untyped_storage().nbytes() == given.untyped_storage().nbytes()


def test_dropout(device: str) -> None:
    q, k = torch.randn(2, 2, 4, 64, 8, device=device)
    ones = torch.ones_like(k)
    torch.manual_seed(3)
    found = scaled_dot_product_attention(q, k, ones, dropout_p=0.5)
    # Kept weights are doubled: each output is 1 in the mean, and 1 exactly without dropout.
    assert found.mean().item() == pytest.approx(1, abs=0.1)
    assert found.std().item() > 0.1
    torch.manual_seed(3)
    assert torch.equal(scaled_dot_product_attention(q, k, ones, dropout_p=0.5), found)


def test_autocast(device: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, device=device)
    mask = torch.randn(6, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        for given in (mask, mask.half(), mask > 0):
            found = scaled_dot_product_attention(q, k.bfloat16(), v, given)
            assert found.dtype == torch.bfloat16
            expected = ORIGINAL(q, k.bfloat16(), v, given)
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_compiles_without_a_graph_break(device: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, device=device)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    for arguments in ({"is_causal": True}, {"attn_mask": torch.randn(6, 6, device=device)}):
        torch.testing.assert_close(
            compiled(q, k, v, **arguments), ORIGINAL(q, k, v, **arguments), rtol=1e-4, atol=1e-5
        )


def test_torch_func(device: str) -> None:
    q, k, v = doubles(device, (3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8))
    mask = torch.randn(3, 5, 7, dtype=torch.float64, device=device)
    towards = torch.randn_like(q)
    results = []
    for function in (scaled_dot_product_attention, plain):

        def total(q: torch.Tensor, function: Callable[..., torch.Tensor] = function) -> Any:
            return function(q, k, v).square().sum()

        results.append(
            (
                torch.func.grad(total)(q),
                torch.func.jvp(total, (q,), (towards,))[1],
                torch.func.vmap(function, (0, 0, 0, 0))(q, k, v, mask),
            )
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


Q, K = zeros(3, 2, 5, 8), zeros(3, 2, 7, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attn_mask": zeros(5, 7), "is_causal": True}, ValueError, r"exclude each other: .*\.tril\(\)"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor; got list"),
        ({"attn_mask": 3}, TypeError, "attn_mask must be a torch.Tensor; got int"),
        ({"query": zeros(8)}, ValueError, r"query must be \(..., seqlen, head_dim\)"),
        ({"query": zeros(5, 0), "key": zeros(7, 0)}, ValueError, "head_dim of at least 1"),
        ({"value": zeros(3, 2, 7, 0)}, ValueError, "value must be .* head_dim of at least 1"),
        ({"key": zeros(3, 2, 7, 6)}, ValueError, r"key must have query's head_dim 8; got"),
        ({"value": zeros(3, 2, 6, 8)}, ValueError, "value must have key's seqlen 7; got"),
        ({"key": zeros(3, 2, 7, 8, dtype=torch.half)}, TypeError, "one dtype; got query"),
        ({"query": zeros(5, 8, dtype=torch.long)}, TypeError, "query must have one of the dtypes"),
        ({"query": zeros(4, 2, 5, 8)}, ValueError, "leading dimensions of .* must broadcast"),
        ({"query": zeros(3, 4, 5, 8)}, ValueError, r"got 4, 2 and 2 \(enable_gqa=True shares"),
        ({"query": zeros(3, 0, 5, 8), "enable_gqa": True, "key": zeros(3, 0, 7, 8)},
         ValueError, "must divide query's 0; got 0"),
        ({"query": zeros(3, 3, 5, 8), "enable_gqa": True}, ValueError, "must divide query's 3"),
        ({"attn_mask": zeros(7)}, ValueError, "have 2 to 4 dimensions; got"),
        ({"attn_mask": zeros(4, 7)}, ValueError, r"\(3, 2, 5, 7\) and .* got \(4, 7\)"),
        ({"attn_mask": zeros(1, 3, 2, 5, 7)}, ValueError, "2 to 4 dimensions"),
        ({"attn_mask": zeros(5, 7, dtype=torch.long)}, TypeError, "boolean, float32 or of query's"),
        ({"attn_mask": zeros(5, 7, dtype=torch.half)}, TypeError, "attn_mask must be boolean"),
        ({"attn_mask": zeros(5, 7).to("meta")}, ValueError, "attn_mask must be on query's device"),
        ({"value": K.to("meta")}, ValueError, "value must be on query's device cpu; got meta"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be a number in \[0, 1\]; got 1.5"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be"),
        ({"dropout_p": None}, ValueError, "dropout_p must be"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool; got int"),
        ({"scale": float("inf")}, ValueError, "scale must be finite; got inf"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**{"query": Q, "key": K, "value": K, **arguments})


# --- override_sdpa ------------------------------------------------------------------------------


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    """The keyword arguments of every call of the fused op."""
    calls: list[Arguments] = []

    def spy(*tensors: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs)
        return fastattn.attention(*tensors, **kwargs)

    monkeypatch.setattr(sdpa, "attention", spy)
    return calls


def test_override_reroutes_and_restores(device: str, op_calls: list[Arguments]) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, device=device)
    expected = ORIGINAL(q, k, v, is_causal=True)
    with override_sdpa():
        assert F.scaled_dot_product_attention is not ORIGINAL
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, None, 0.0, True), expected
        )
        with override_sdpa():
            F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v, scale=0.5)
    assert F.scaled_dot_product_attention is ORIGINAL
    assert [call["causal"] for call in op_calls] == ["top_left", False, False]
    with contextlib.suppress(KeyError), override_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL
    F.scaled_dot_product_attention(q, k, v)
    assert len(op_calls) == 3


def is_overridden(op_calls: list[Arguments]) -> bool:
    before = len(op_calls)
    F.scaled_dot_product_attention(Q, K, K)
    return len(op_calls) > before


def test_override_ends_in_any_order(op_calls: list[Arguments]) -> None:
    first, second = override_sdpa(), override_sdpa()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_overridden(op_calls)
    second.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is ORIGINAL

    def blocks() -> Iterator[None]:
        with override_sdpa():
            yield

    first_block, second_block = blocks(), blocks()
    next(first_block)
    next(second_block)
    del first_block
    assert is_overridden(op_calls)
    del second_block
    assert F.scaled_dot_product_attention is ORIGINAL


def test_override_in_threads(op_calls: list[Arguments]) -> None:
    """One thread leaves its block in the middle of the other's."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with override_sdpa():
            entered.set()
            assert leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    with override_sdpa():
        leave.set()
        thread.join()
        assert is_overridden(op_calls)
    assert F.scaled_dot_product_attention is ORIGINAL


def test_many_threads_enter_and_leave() -> None:
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for i in range(200):
            with override_sdpa():
                if (seed + i) % 3 == 0:  # which has the original put back for a moment
                    F.scaled_dot_product_attention(Q.as_subclass(Subclass), K, K)
                elif F.scaled_dot_product_attention not in (ORIGINAL, sdpa._rerouted):
                    wrong.append(F.scaled_dot_product_attention)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert F.scaled_dot_product_attention is ORIGINAL


def test_what_others_put_there_stays(
    op_calls: list[Arguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", ORIGINAL)  # put back in any case
    theirs: list[Any] = []

    def patch(*args: Any, **kwargs: Any) -> torch.Tensor:
        theirs.append(args)
        return found(*args, **kwargs)

    with override_sdpa():
        found = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = patch
        with override_sdpa():
            assert is_overridden(op_calls)  # by way of the patch
        assert F.scaled_dot_product_attention is patch
    assert F.scaled_dot_product_attention is patch
    assert not is_overridden(op_calls)
    assert len(theirs) == 2
    F.scaled_dot_product_attention = found  # as its owner takes it away
    assert not is_overridden(op_calls)
    with override_sdpa():
        assert is_overridden(op_calls)
    assert not is_overridden(op_calls)


def test_a_patch_from_before_comes_back(
    op_calls: list[Arguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    def patch(*args: Any, **kwargs: Any) -> torch.Tensor:
        return ORIGINAL(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", patch)
    with override_sdpa():
        assert is_overridden(op_calls)
    assert F.scaled_dot_product_attention is patch


def test_a_block_inside_of_what_is_compiled(device: str, op_calls: list[Arguments]) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, device=device)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with override_sdpa():
            return F.scaled_dot_product_attention(q, k, v)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), ORIGINAL(q, k, v))
    assert F.scaled_dot_product_attention is ORIGINAL
    with override_sdpa():
        assert is_overridden(op_calls)


class Asks(torch.Tensor):
    """A subclass that asks whether it is torch's attribute that was called."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return "asked"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_override_lets_subclasses_ask(op_calls: list[Arguments]) -> None:
    with override_sdpa():
        assert F.scaled_dot_product_attention(Q.as_subclass(Asks), K, K) == "asked"
        assert is_overridden(op_calls)


def test_override_reaches_torchs_modules(device: str, op_calls: list[Arguments]) -> None:
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True).to(device)
    x = torch.randn(2, 5, 16, device=device)
    mask = torch.randn(5, 5, device=device)
    expected, _ = attention(x, x, x, need_weights=False, attn_mask=mask)
    with override_sdpa():
        found, _ = attention(x, x, x, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(found, expected)
    assert len(op_calls) == 1


# (seqlen_q, seqlen_k): a query that sees nothing is undefined in torch, so no more queries than keys
@pytest.mark.parametrize("lengths", [(6, 6), (5, 7), (1, 7)])
@pytest.mark.parametrize("corner", ["causal_upper_left", "causal_lower_right"])
def test_torchs_causal_biases(
    corner: str, lengths: tuple[int, int], device: str, op_calls: list[Arguments]
) -> None:
    seqlen_q, seqlen_k = lengths
    tensors = doubles(device, (3, 2, seqlen_q, 8), *[(3, 2, seqlen_k, 8)] * 2)
    bias = getattr(torch.nn.attention.bias, corner)(*lengths)
    theirs = run(ORIGINAL, tensors, {"attn_mask": bias._materialize(torch.device(device))})

    def overridden(*given: torch.Tensor) -> torch.Tensor:
        with override_sdpa():
            return F.scaled_dot_product_attention(*given, bias)

    for function in (lambda *given: scaled_dot_product_attention(*given, bias), overridden):
        ours = run(function, tensors, {})
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-12)
    causal = "top_left" if corner == "causal_upper_left" else "bottom_right"
    assert [(call["causal"], call["mask"]) for call in op_calls] == [(causal, None)] * 2


def test_a_causal_bias_that_does_not_fit(op_calls: list[Arguments]) -> None:
    bias = torch.nn.attention.bias.causal_lower_right(3, 7)
    message = r"attn_mask is a causal bias of \(3, 7\); .* the lengths of query and key, \(5, 7\)"
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(Q, K, K, bias)
    fitting = torch.nn.attention.bias.causal_lower_right(5, 7)
    with pytest.raises(ValueError, match="a causal bias already: leave is_causal False"):
        scaled_dot_product_attention(Q, K, K, fitting, is_causal=True)
    with override_sdpa():  # torch's own errors, found by comparing what was called
        with pytest.raises(RuntimeError, match="must match the size"):
            F.scaled_dot_product_attention(Q, K, K, bias)
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            F.scaled_dot_product_attention(Q, K, K, fitting, is_causal=True)
    assert not op_calls


class Subclass(torch.Tensor):
    """A tensor with a behaviour of its own, which only the original respects."""


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        (lambda x: x.as_subclass(Subclass), {}),
        (lambda x: x, {"attn_mask": torch.zeros(6, 6).as_subclass(Subclass)}),
        (lambda x: x[..., :0], {}),
    ],
    ids=["subclass", "subclass of the mask", "head_dim 0"],
)
def test_override_leaves_to_the_original(
    change: Callable[..., torch.Tensor], arguments: Arguments, op_calls: list[Arguments]
) -> None:
    q, k, v = (change(x) for x in torch.randn(3, 2, 4, 6, 8))
    expected = ORIGINAL(q, k, v, **arguments)
    with override_sdpa():
        found = F.scaled_dot_product_attention(q, k, v, **arguments)
    assert torch.equal(found, expected)
    assert type(found) is type(expected)
    assert not op_calls


def test_override_leaves_a_mask_with_is_causal_to_the_original(op_calls: list[Arguments]) -> None:
    """Which takes both or raises, by version."""

    def outcome() -> Any:
        mask = torch.ones(6, 6, dtype=torch.bool)
        try:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=True).tolist()
        except RuntimeError as error:
            return str(error)

    q, k, v = torch.randn(3, 2, 4, 6, 8)
    expected = outcome()
    with override_sdpa():
        assert outcome() == expected
    assert not op_calls


def test_override_without_heads(op_calls: list[Arguments]) -> None:
    """Which ends the process in the original of torch 2.11, on a CPU."""
    q, k, v = (torch.randn(2, 0, n, 8, requires_grad=True) for n in (5, 7, 7))
    with override_sdpa():
        for arguments in ({}, {"is_causal": True}, {"attn_mask": torch.randn(5, 7)}):
            out = F.scaled_dot_product_attention(q, k, v, **arguments)
            assert out.shape == (2, 0, 5, 8)
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]
    assert not op_calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_override_leaves_nested_tensors(layout: torch.layout, op_calls: list[Arguments]) -> None:
    x = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=layout)
    x = x.transpose(1, 2)
    if layout == torch.strided:  # of which torch takes only contiguous ones
        x = x.contiguous()
    expected = ORIGINAL(x, x, x)
    with override_sdpa():
        found = F.scaled_dot_product_attention(x, x, x)
    for ours, theirs in zip(found.unbind(), expected.unbind(), strict=True):
        assert torch.equal(ours, theirs)
    assert not op_calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (3, 3)], layout=layout)
    fix = r"attention_varlen\(.*\) on its values, or torch\.nn\.functional\.scaled_dot_product"
    for name, given in (("query", (x, x, x)), ("value", (Q, K, x)), ("attn_mask", (Q, K, K, x))):
        with pytest.raises(TypeError, match=f"{name} is a nested tensor: use .*{fix}"):
            scaled_dot_product_attention(*given)


def test_override_leaves_wrong_arguments_to_torchs_errors() -> None:
    with override_sdpa():
        with pytest.raises(RuntimeError, match="same dtype"):
            F.scaled_dot_product_attention(Q, K.half(), K)
        with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
            F.scaled_dot_product_attention(Q, K, K, window=3)
        with pytest.raises(TypeError, match="query"):
            F.scaled_dot_product_attention([1.0], K, K)


def test_override_passes_the_error_of_a_named_backend(device: str) -> None:
    """A backend that the user names is never replaced in silence."""
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64, device=device)
    reason = pytest.raises(fastattn.UnsupportedError, match="cuda")
    with fastattn.use_backend("cuda"), override_sdpa(), reason:
        F.scaled_dot_product_attention(q, q, q)


def test_the_torch_backend_runs_under_the_override(device: str) -> None:
    """Our own use of F.sdpa must not come back to us."""
    q, k, v = torch.randn(3, 2, 4, 6, 8, device=device)
    expected = ORIGINAL(q, k, v, is_causal=True)
    with fastattn.use_backend("torch"), override_sdpa():
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, expected)


def test_override_compiles(device: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, device=device)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with override_sdpa():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), ORIGINAL(q, k, v, is_causal=True))


# --- PyTorch's registry -------------------------------------------------------------------------

OVERRIDDEN = "ignore:Warning only once for all operators"


@pytest.mark.filterwarnings(OVERRIDDEN)
def test_register() -> None:
    torch_attention = pytest.importorskip("torch.nn.attention")
    if not hasattr(torch_attention, "register_flash_attention_impl"):
        with pytest.raises(RuntimeError, match="no registry of flash attention implementations"):
            register()
        return
    register()
    register()  # twice is harmless
    assert torch_attention.list_flash_attention_impls().count(NAME) == 1
    if torch.version.cuda is None:
        with pytest.raises(RuntimeError, match="built without flash attention for CUDA"):
            torch_attention.activate_flash_attention_impl(NAME)
        return
    if not hasattr(torch_attention, "restore_flash_attention_impl"):
        pytest.skip(f"torch {torch.__version__} activates an implementation for good")
    torch_attention.activate_flash_attention_impl(NAME)  # with or without a GPU
    assert torch_attention.current_flash_attention_impl() == NAME
    torch_attention.restore_flash_attention_impl()
    assert torch_attention.current_flash_attention_impl() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="replaces CUDA kernels")
@pytest.mark.filterwarnings(OVERRIDDEN)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activated(kv_heads: int, compiled: bool) -> None:
    """On a GPU: what F.sdpa sends to flash runs on our kernels, and stops to afterwards."""
    torch_attention = pytest.importorskip("torch.nn.attention")
    shapes = ((2, 4, 65, 32), *[(2, kv_heads, 65, 32)] * 2)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.float16) for shape in shapes]
    arguments = {"is_causal": True, "enable_gqa": True}

    def flash(*inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*inputs, **kwargs)

    eager = run(flash, tensors, arguments)
    reference = run(ORIGINAL, [x.double() for x in tensors], arguments)
    register()
    torch_attention.activate_flash_attention_impl(NAME)
    try:
        assert torch_attention.current_flash_attention_impl() == NAME
        function = torch.compile(flash) if compiled else flash
        ours = run(function, tensors, arguments)
    finally:
        torch_attention.restore_flash_attention_impl()
    for name, found in ours.items():
        assert found is not None, name
        assert_close_to_reference(found, eager[name], reference[name], name=name)
    assert torch.equal(run(flash, tensors, arguments)["out"], eager["out"])


@pytest.fixture
def installed(device: str) -> Iterator[list[str]]:
    """The implementation in place of two kernels that note their calls; on a CPU there are none.

    Yields the notes.
    """
    if device == "cuda":
        pytest.skip("the CPU build has no flash kernels in whose place a test could put its own")
    notes: list[str] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        notes.append(FORWARD)
        out, lse = torch.zeros_like(args[0]), args[0].new_zeros(args[0].shape[:-1])
        word = torch.zeros(2, dtype=torch.uint64)
        return out, lse, None, None, 1, 1, word, word, out

    def backward(grad: torch.Tensor, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        notes.append(BACKWARD)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl(FORWARD, forward, "CPU")
    library.impl(BACKWARD, backward, "CPU")
    implementation = Implementation("CPU")
    try:
        with fastattn.use_backend("triton"):
            yield notes
    finally:
        implementation.remove()
        torch.ops.aten._scaled_dot_product_flash_attention(*torch.zeros(3, 1, 1, 1, 8))
        assert notes[-1] == FORWARD, "remove() left our kernel in place"
        library._destroy()


@pytest.mark.filterwarnings(OVERRIDDEN)
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": 0.3}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_ops(installed: list[str], kv_heads: int, arguments: Arguments) -> None:
    """Grouped heads, bottom-right causal, gradients through autograd's own rule."""
    tensors = [torch.randn(shape) for shape in ((2, 4, 5, 16), *[(2, kv_heads, 7, 16)] * 2)]

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out, lse, _, _, max_q, max_k, state, offset, _ = (
            torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **kwargs)
        )
        assert out.stride() == q.stride()
        assert lse.shape == q.shape[:-1]
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        assert (state.dtype, state.shape, offset.dtype) == (torch.uint64, (2,), torch.uint64)
        return out

    ours = run(flash, tensors, arguments)
    theirs = {"enable_gqa": True, **arguments}
    if theirs.pop("is_causal", False):
        theirs["attn_mask"] = torch.ones(5, 7, dtype=torch.bool).tril(2)
    eager = run(ORIGINAL, tensors, theirs)
    reference = run(ORIGINAL, [x.double() for x in tensors], theirs)
    for name, found in ours.items():
        assert found is not None, name
        assert_close_to_reference(found, eager[name], reference[name], name=name, ulps=16)
    assert not installed


@pytest.mark.filterwarnings(OVERRIDDEN)
def test_flash_ops_replay_their_dropout(installed: list[str]) -> None:
    q, k = torch.randn(2, 1, 2, 6, 16)
    v = torch.eye(16)[:6].expand(1, 2, 6, 16).clone().requires_grad_()
    out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.5)
    kept = out[..., :6]  # the weights themselves, as v is the identity
    assert (kept == 0).any()
    (grad,) = torch.autograd.grad(out, v, torch.eye(16)[:6].expand(1, 2, 6, 16))
    torch.testing.assert_close(grad[..., :6], kept.mT)


@pytest.mark.filterwarnings(OVERRIDDEN)
def test_flash_ops_that_we_do_not_take_stay(installed: list[str]) -> None:
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    with fastattn.use_backend("torch"):  # which is what was there before
        out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
        out.sum().backward()
    assert installed == [FORWARD, BACKWARD]
    with pytest.raises(RuntimeError, match="return_debug_mask: fastattn never holds"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, return_debug_mask=True)
