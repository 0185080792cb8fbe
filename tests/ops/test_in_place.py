"""What an op returns may be modified in place, like any tensor of PyTorch.

Where a backward reads that result itself, it says so, as PyTorch's own ops do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastattn

Tensors = tuple[torch.Tensor, ...]
BACKENDS = ("reference", "torch", "triton", "cuda")


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


def as_tuple(result: Any) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


QKV = ((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16))
PACKED = ((7, 2, 16),) * 3
WEIGHTS = ((16, 8), (16,), (8, 16), (8,))
STARTS = torch.tensor([0, 3, 7], dtype=torch.int32)
ANGLES = torch.randn(5, 8)


def layered(*shape: int) -> tuple[tuple[int, ...], ...]:
    return shape, *WEIGHTS


# The op, the shapes of its inputs, and which of its results its backward reads.
OPS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "attention": (fastattn.attention, QKV, (0,)),
    "attention, mask": (
        lambda q, k, v, **kw: fastattn.attention(
            q, k, v, mask=torch.ones(5, 7, dtype=torch.bool, device=q.device), **kw
        ),
        QKV,
        (0,),
    ),
    "attention_varlen": (
        lambda q, k, v, **kw: fastattn.attention_varlen(
            q, k, v, STARTS.to(q.device), STARTS.to(q.device), **kw
        ),
        PACKED,
        (0,),
    ),
    "layer_norm": (fastattn.layer_norm, ((2, 3, 8), (8,), (8,)), ()),
    "layer_norm, residual": (
        lambda x, w, b, r, **kw: fastattn.layer_norm(x, w, b, 1e-5, r, **kw),
        ((2, 3, 8), (8,), (8,), (2, 3, 8)),
        (1,),
    ),
    "rms_norm": (fastattn.rms_norm, ((2, 3, 8), (8,)), ()),
    "ffn": (fastattn.ffn, layered(2, 3, 8), ()),
    "ffn, relu": (
        lambda *x, **kw: fastattn.ffn(*x, activation="relu", **kw), layered(2, 3, 8), ()
    ),
    "ffn, recompute": (
        lambda *x, **kw: fastattn.ffn(*x, recompute=True, **kw), layered(2, 3, 8), ()
    ),
    "ffn, gated": (
        lambda x, w1, b1, w2, b2, gate, **kw: fastattn.ffn(x, w1, b1, w2, b2, gate=gate, **kw),
        (*layered(2, 3, 8), WEIGHTS[0]), ()
    ),
    "ffn, a token": (fastattn.ffn, layered(8), ()),
    "ffn, tokens": (fastattn.ffn, layered(3, 8), ()),
    "linear": (
        lambda *x, **kw: fastattn.linear(*x, "gelu", **kw), ((2, 3, 8), (16, 8), (16,)), ()
    ),
    "rotary": (
        lambda q, k, **kw: fastattn.rotary(q, k, *(ANGLES.to(q.device),) * 2, **kw),
        ((2, 5, 4, 16), (2, 5, 2, 16)), ()
    ),
}  # fmt: skip
NOT_IN_CUDA = ("ffn, gated", "linear", "rotary")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    yield request.param


@pytest.mark.parametrize("name", OPS)
def test_a_result_modified_in_place(name: str, backend: str, device: str) -> None:
    """Each result in turn; the results and gradients are those of an addition that makes a copy."""
    op, shapes, read = OPS[name]
    if name in NOT_IN_CUDA and backend == "cuda":
        pytest.skip("there are no such CUDA kernels")
    dtype = torch.float16 if backend == "cuda" else torch.float32
    leaves = tuple(x.detach().to(device).requires_grad_() for x in inputs(*shapes, dtype=dtype))
    for index in range(len(as_tuple(op(*leaves, backend=backend)))):
        copied, modified = (list(as_tuple(op(*leaves, backend=backend))) for _ in range(2))
        copied[index] = copied[index] + 1.0
        modified[index] += 1.0
        for a, b in zip(copied, modified, strict=True):
            assert torch.equal(a, b)
        losses = [sum(x.square().sum() for x in results) for results in (copied, modified)]
        expected = torch.autograd.grad(losses[0], leaves)  # type: ignore[arg-type]
        try:
            gradients = torch.autograd.grad(losses[1], leaves)  # type: ignore[arg-type]
        except RuntimeError as error:
            assert index in read and "modified by an inplace operation" in str(error)
            continue
        for a, b in zip(expected, gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_without_gradients(name: str, backend: str, device: str) -> None:
    op, shapes, _ = OPS[name]
    if name in NOT_IN_CUDA and backend == "cuda":
        pytest.skip("there are no such CUDA kernels")
    dtype = torch.float16 if backend == "cuda" else torch.float32
    tensors = tuple(x.detach().to(device) for x in inputs(*shapes, dtype=dtype))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = [x.clone() for x in tensors]
            for result in as_tuple(op(*tensors, backend=backend)):
                result += 1.0
            for a, b in zip(before, tensors, strict=True):
                assert torch.equal(a, b)


def test_a_decoded_token(backend: str, device: str) -> None:
    dtype = torch.float16 if backend == "cuda" else torch.float32
    q, k, v = (torch.randn(2, 1, 2, 16, device=device).to(dtype) for _ in "qkv")
    caches = [torch.zeros(2, 8, 2, 16, dtype=dtype, device=device) for _ in "kv"]
    lengths = torch.tensor([3, 3], dtype=torch.int32, device=device)
    if backend == "torch" and device != "cpu":
        pytest.skip("ATen has no cache on a GPU")
    out = fastattn.attention_with_kv_cache(q, *caches, lengths, k=k, v=v, backend=backend)
    kept = [x.clone() for x in caches]
    out += 1.0
    for a, b in zip(kept, caches, strict=True):
        assert torch.equal(a, b)


def test_dropout_in_place_and_a_residual() -> None:
    """Modules as users write them."""
    feed_forward = fastattn.nn.FeedForward(8, 16)
    x = torch.randn(2, 3, 8)
    h = torch.nn.Dropout(0.5, inplace=True)(feed_forward(x))
    h += x
    h.sum().backward()
    assert all(p.grad is not None for p in feed_forward.parameters())
