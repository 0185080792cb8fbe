"""`fastattn.scaled_dot_product_attention` against torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from integrations.sdpa_calls import ORIGINAL, Arguments, K, Q, Shape, doubles, plain, run, zeros

import fastattn
from fastattn.integrations import sdpa
from fastattn.integrations.sdpa import scaled_dot_product_attention
from oracle import assert_close_to_reference


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
