"""What may not change a result: strides of index tensors, scalars of numpy, the call's surroundings."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from ops.attention.cases import WITH_DOCUMENTS
from ops.backends import BACKENDS, assert_near, widest
from torch.autograd import forward_ad

import fastattn
from fastattn import BlockMask, attention, attention_varlen, backends
from fastattn.backends import triton_runs

Tensors = tuple[torch.Tensor, ...]


def tensors(device: str, *lengths: int, batch: int = 1, backend: str | None = None) -> Tensors:
    """In the dtype that the backend takes."""
    dtype = widest(backend)
    return tuple(torch.randn(batch, n, 2, 16, device=device).to(dtype) for n in lengths)


def results(call: Any, *inputs: torch.Tensor) -> Tensors:
    """Output and gradients of a sum with random weights, the same in every call."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(out.shape, generator=generator).to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, towards)


def assert_same(found: Tensors, expected: Tensors) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, atol=1e-4)


# --- strides --------------------------------------------------------------------------------------


def beside(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second one in memory; what lies between must not be read."""
    return torch.stack([x, torch.full_like(x, 1)], -1)[..., 0]


OF_LENGTHS = [(False, backend) for backend in BACKENDS]
OF_LENGTHS += [(True, backend) for backend in WITH_DOCUMENTS]


@pytest.mark.parametrize(("documents", "backend"), OF_LENGTHS)
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_strided_lengths(seqlen_q: int, documents: bool, backend: str, device: str) -> None:
    q, k, v = tensors(device, seqlen_q, 90, 90, batch=3, backend=backend)
    lengths = torch.tensor([90, 0, 77], device=device)
    options: dict[str, Any] = {}
    if documents:
        ids = torch.arange(90, device=device).expand(3, -1) // 30
        options["document_ids"] = ids[:, -seqlen_q:], beside(ids)

    def call(lengths: torch.Tensor, backend: str) -> Tensors:
        def run(*x: torch.Tensor) -> torch.Tensor:
            return attention(*x, key_lengths=lengths, backend=backend, **options)

        return results(run, q, k, v)

    assert_same(call(beside(lengths), backend), call(lengths, "reference"))
    same = torch.full((1,), 65, device=device)
    assert_same(call(same.expand(3), backend), call(same.repeat(3), "reference"))


@pytest.mark.parametrize(("documents", "backend"), OF_LENGTHS)
def test_strided_starts(documents: bool, backend: str, device: str) -> None:
    (x,) = tensors(device, 90, backend=backend)
    starts, used = (torch.tensor(n, device=device) for n in ([0, 40, 41, 90], [30, 1, 44]))
    options = {"document_ids": torch.arange(90, device=device) // 25} if documents else {}

    def call(starts: torch.Tensor, used: torch.Tensor, backend: str) -> Tensors:
        def run(*x: torch.Tensor) -> torch.Tensor:
            return attention_varlen(
                *x, starts, starts, 60, 60, seqused_k=used, causal=True, backend=backend, **options
            )

        return results(run, x[0], x[0] + 1, x[0] + 2)

    if device == "cuda" and backend == "torch":
        pytest.skip("ATen has no packed sequences there")
    assert_same(call(beside(starts), beside(used), backend), call(starts, used, "reference"))


@pytest.mark.parametrize("backend", WITH_DOCUMENTS)
@pytest.mark.parametrize("what", ["offsets", "indices", "patterns", "expanded"])
def test_strided_block_masks(what: str, backend: str, device: str) -> None:
    made = BlockMask.from_predicate(lambda b, h, i, j: j <= i, 1, 1, 64, 64, block_size=16)
    parts = {n: getattr(made, n).to(device) for n in ("offsets", "indices", "partial", "patterns")}
    if what == "expanded":
        parts["offsets"] = parts["offsets"].expand(1, 2, -1)
    elif what == "patterns":
        parts[what] = parts[what].mT.contiguous().mT
    else:
        parts[what] = beside(parts[what])
    mask = BlockMask(parts.pop("offsets"), parts.pop("indices"), 16, 4, **parts)
    inputs = tensors(device, 64, 64, 64)
    found = results(lambda *x: attention(*x, block_mask=mask, backend=backend), *inputs)
    assert_same(found, results(lambda *x: attention(*x, causal=True, backend="reference"), *inputs))


# --- contents -------------------------------------------------------------------------------------


HIDING: dict[str, Any] = {
    "causal": lambda device: {"causal": True},
    "window": lambda device: {"window": (0, 0)},
    "mask": lambda device: {"mask": hidden_rows(device)},
    "bias": lambda device: {"bias": torch.zeros(6, 4, device=device).masked_fill(~hidden_rows(device), -torch.inf)},
    "lengths": lambda device: {"key_lengths": torch.tensor([0], device=device)},
    "documents": lambda device: {"document_ids": (torch.tensor([[8, 9, 1, 1, 1, 1]], device=device), torch.ones(1, 4, dtype=torch.long, device=device))},
}  # fmt: skip


def hidden_rows(device: str) -> torch.Tensor:
    return torch.ones(6, 4, dtype=torch.bool, device=device).tril(-2)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(x, y) for y in BACKENDS for x in HIDING if (x, y) != ("documents", "cuda")],
)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_no_gradient_arrives_at_a_row_without_keys(
    bad: float, name: str, backend: str, device: str
) -> None:
    """Whatever it is: such a row's output is constant."""
    options = HIDING[name](device)
    leaves = [x.requires_grad_() for x in tensors(device, 6, 4, 4, backend=backend)]
    if "bias" in options and backend != "cuda":
        leaves.append(options["bias"].requires_grad_())
    out = attention(*leaves[:3], backend=backend, **options)
    seen = out.detach().abs().amax((0, 2, 3)) > 0
    assert not seen.all()
    towards = torch.ones_like(out)
    expected = torch.autograd.grad(out, leaves, towards * seen[:, None, None], retain_graph=True)
    found = torch.autograd.grad(out, leaves, towards.masked_fill(~seen[:, None, None], bad))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-46, -1e-46, -0.25])
def test_a_scale_of_nothing_and_less(scale: float, causal: bool, backend: str, device: str) -> None:
    inputs = tensors(device, 6, 6, 6, backend=backend)
    options = {"causal": causal, "softmax_scale": scale}
    found = results(lambda *x: attention(*x, backend=backend, **options), *inputs)
    expected = results(
        lambda *x: attention(*x, backend="reference", **options), *(x.double() for x in inputs)
    )
    assert_same(found, expected)


def test_block_mask_is_for_its_lengths(device: str) -> None:
    """100 and 120 have as many tiles; what the rule says of keys past 100 was never asked."""
    mask = BlockMask.from_predicate(
        lambda b, h, i, j: i >= j, 1, 1, 100, 100, block_size=64, device=device
    )
    q, k, v = tensors(device, 120, 120, 120)
    with pytest.raises(ValueError, match=r"made for \(seqlen_q, seqlen_k\) = \(100, 100\); this"):
        attention(q, k, v, block_mask=mask)
    attention(q[:, :100], k[:, :100], v[:, :100], block_mask=mask)
    with pytest.raises(ValueError, match="make one for these lengths"):  # also with a plan at hand
        attention(q[:, :100], k, v, block_mask=mask)


@pytest.mark.parametrize("indices", [[0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 1]])
def test_lists_of_tiles_ascend(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend within each row of tiles, each tile once"):
        BlockMask(torch.tensor([[[0, 2, 4]]]), torch.tensor(indices), 16, 2)
    BlockMask(torch.tensor([[[0, 2, 4]]]), torch.tensor([0, 1, 0, 1]), 16, 2)


# --- surroundings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"causal": 1}, {"causal": True}),
        ({"causal": numpy.True_}, {"causal": True}),
        ({"causal": numpy.False_}, {"causal": False}),
        ({"softmax_scale": numpy.float32(0.5)}, {"softmax_scale": 0.5}),
        ({"softcap": numpy.float32(2.0)}, {"softcap": 2.0}),
        ({"window": (numpy.int64(3), numpy.int64(1))}, {"window": (3, 1)}),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_numbers_of_other_kinds(
    first: bool, given: Any, same: Any, backend: str, device: str
) -> None:
    """As the plain ones, whether a plan of an equal key is there or not."""
    if backend == "torch" and "softcap" in given:
        pytest.skip("ATen has no softcap")
    length = 21 if first else 22  # a shape of its own: no plan
    q, k, v = tensors(device, length, length, length, backend=backend)
    calls = [given, same] if first else [same, given]
    outs = [attention(q, k, v, backend=backend, **options) for options in calls]
    assert torch.equal(*outs)


def test_backward_under_another_choice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which backend runs a backward is settled by its forward, not by what surrounds it."""
    monkeypatch.setattr(backends.Backend, "declined", lambda self, problem, **_: None)
    monkeypatch.setattr("fastattn.ops.attention.interface._dispatch.plans.get", lambda key: None)
    monkeypatch.setattr("fastattn.ops.attention.straight.run", lambda *call: None)
    inputs = tensors(device, 9, 9, 9)
    expected = results(lambda *x: attention(*x, backend="reference"), *inputs)

    def run(context: Any, backend: str | None) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves, backend=backend)
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        with context:
            return out.detach(), *torch.autograd.grad(out, leaves, towards)

    for backend in (None, "triton"):
        assert_same(run(fastattn.use_backend("torch"), backend), expected)
        assert_same(run(forward_ad.dual_level(), backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_a_bias_and_a_sink_along(backend: str, device: str) -> None:
    if backend == "triton" and triton_runs() == "interpreted":
        dtype = torch.float16
    else:
        dtype = torch.bfloat16
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    q, k, v = (x.to(other) for x in tensors(device, 9, 9, 9))
    bias, sink = torch.randn(9, 9, device=device).to(other), None
    if backend != "torch":
        sink = torch.randn(2, device=device).to(other)
    with torch.autocast(device, dtype):
        found = attention(q, k, v, bias=bias, sink=sink, backend=backend)
    expected = attention(
        *(x.double() for x in (q, k, v, bias)[:3]), bias=bias.double(),
        sink=None if sink is None else sink.double(), backend="reference",
    )  # fmt: skip
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


# --- packed calls of nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", WITH_DOCUMENTS)
def test_documents_of_no_keys(backend: str, device: str) -> None:
    if backend == "torch":
        pytest.skip("ATen's fused attention is undefined for empty tensors")
    nothing = torch.zeros(0, 2, 16, device=device)
    starts = torch.tensor([0, 3, 5], device=device)
    ids = tuple(torch.zeros(n, dtype=torch.long, device=device) for n in (5, 0))
    q = torch.randn(5, 2, 16, device=device)
    out = attention_varlen(
        q, nothing, nothing, starts, 0 * starts, 3, 8, document_ids=ids, backend=backend
    )
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_only_bias_or_sink_wants_a_gradient(tokens: int, backend: str, device: str) -> None:
    """Where no query or no key is left."""
    if backend == "torch" and not tokens:
        pytest.skip("ATen's fused attention is undefined for empty tensors")
    x = torch.randn(tokens, 2, 16, device=device).to(widest(backend))
    starts = torch.tensor([0, tokens], device=device)
    leaves = {}
    if backend != "cuda":
        leaves["bias"] = torch.zeros(1, 2, tokens, tokens, device=device, requires_grad=True)
    if backend != "torch":
        leaves["sink"] = torch.zeros(2, device=device, requires_grad=True)
    used = torch.zeros(1, dtype=torch.long, device=device)
    out = attention_varlen(
        x, x, x, starts, starts, tokens, tokens, seqused_k=used, backend=backend, **leaves
    )
    out.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())
