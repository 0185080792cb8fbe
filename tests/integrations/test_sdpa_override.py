"""`override_sdpa`: F.scaled_dot_product_attention on fastattn inside a block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.bias
import torch.nn.functional as F
from integrations.sdpa_calls import ORIGINAL, Arguments, K, Q, doubles, run

import fastattn
from fastattn.integrations import sdpa
from fastattn.integrations.sdpa import override_sdpa, scaled_dot_product_attention


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
