"""PyTorch's registry of flash attention implementations, and its ops on fastattn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.sdpa_calls import ORIGINAL, Arguments, run

import fastattn
from fastattn.integrations.sdpa import register
from fastattn.integrations.sdpa_flash import BACKWARD, FORWARD, NAME, Implementation
from oracle import assert_close_to_reference

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
