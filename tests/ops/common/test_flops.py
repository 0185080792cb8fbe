"""torch.utils.flop_counter counts our ops, as it counts the products of which they consist."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn

BACKENDS = ("reference", "triton")


def counted(run: Callable[..., Any], *inputs: torch.Tensor) -> tuple[int, int]:
    """FLOPs of the forward, and of the backward to all inputs that want a gradient."""
    with FlopCounterMode(display=False) as forward:
        out = run(*inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), [x for x in inputs if x.requires_grad])
    return forward.get_total_flops(), backward.get_total_flops()


def wanting(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_attention() -> None:
    """2 * batch * heads * seqlen_q * seqlen_k * (head_dim + head_dim_v) forward."""
    q, k, v = wanting((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 32))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, v, causal=True, backend="triton")

    scores = 2 * 4 * 5 * 7
    assert counted(run, q, k, v) == (2 * scores * (16 + 32), 2 * scores * (3 * 16 + 2 * 32))


def test_as_torch_counts_its_own() -> None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    q, k, v = wanting((2, 5, 4, 16), (2, 7, 4, 16), (2, 7, 4, 16))
    found = counted(lambda *x: fastattn.attention(*x, backend="triton"), q, k, v)
    shapes = [x.transpose(1, 2).shape for x in (q, k, v)]
    assert found == (sdpa_flop_count(*shapes), sdpa_backward_flop_count(shapes[0], *shapes))


def test_packed_sequences_count_by_themselves() -> None:
    q, k, v = wanting((9, 2, 16), (12, 2, 16), (12, 2, 16))
    starts_q, starts_k = torch.tensor([0, 3, 3, 9]), torch.tensor([0, 7, 8, 12])

    def run(*qkv: torch.Tensor) -> torch.Tensor:
        return fastattn.attention_varlen(*qkv, starts_q, starts_k, backend="triton")

    scores = 2 * (3 * 7 + 0 * 1 + 6 * 4)
    assert counted(run, q, k, v) == (2 * scores * 2 * 16, 2 * scores * 5 * 16)


@pytest.mark.parametrize(
    ("gated", "wanted"),
    [
        *((False, wanted) for wanted in ("all", "x", "w1", "w2", "b2")),
        *((True, wanted) for wanted in ("all", "x", "w1", "w2", "b2", "gate", "gate_bias")),
    ],
)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_ffn_as_the_reference(layout: str, gated: bool, wanted: str) -> None:
    """The reference is counted product by product."""
    shapes = {"x": (2, 3, 8), "w1": (20, 8), "b1": (20,), "w2": (5, 20), "b2": (5,)}
    if gated:
        shapes |= {"gate": (20, 8), "gate_bias": (20,)}
    inputs = {
        name: torch.randn(
            shape[::-1] if layout == "conv1d" and name in ("w1", "w2", "gate") else shape
        )
        for name, shape in shapes.items()
    }
    for name, x in inputs.items():
        x.requires_grad_(wanted in ("all", name))

    def of(backend: str) -> tuple[int, int]:
        return counted(
            lambda *x: fastattn.ffn(
                *x[:5], layout=layout, backend=backend, **dict(zip(list(inputs)[5:], x[5:]))
            ),
            *inputs.values(),
        )

    assert of("triton") == of("reference")
    assert of("triton")[0] == 2 * 6 * ((2 if gated else 1) * 20 * 8 + 5 * 20)


def test_a_hidden_layer_computed_again_counts_again() -> None:
    inputs = wanting((6, 8), (20, 8), (20,), (5, 20), (5,))

    def run(*x: torch.Tensor) -> torch.Tensor:
        return fastattn.ffn(*x, recompute=True, backend="triton")

    first, second = 2 * 6 * 20 * 8, 2 * 6 * 5 * 20
    assert counted(run, *inputs) == (first + second, 3 * first + 2 * second)


def test_linear_cross_entropy() -> None:
    """Three products, all in the forward if it has one result; else the logits are made again."""
    x, weight = wanting((6, 8), (20, 8))
    targets = torch.randint(20, (6,))

    def run(backend: str, reduction: str = "mean") -> tuple[int, int]:
        options = {"backend": backend, "reduction": reduction}
        return counted(lambda *t: fastattn.linear_cross_entropy(*t, targets, **options), x, weight)

    product = 2 * 6 * 8 * 20
    assert run("triton") == (3 * product, 0)
    assert run("triton", "none") == (product, 3 * product)
    assert run("reference") == (product, 2 * product)
    x.requires_grad_(False)
    assert run("triton") == (2 * product, 0)


@pytest.mark.parametrize("first", ["fastattn", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    """Neither imports the other."""
    second = ({"fastattn", "torch.utils.flop_counter"} - {first}).pop()
    program = f"""
import sys, {first}
assert {second!r} not in sys.modules
import {second}
import torch
known = torch.utils.flop_counter.flop_registry
assert {{torch.ops.fastattn.attention, torch.ops.fastattn.ffn_backward}} <= known.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
