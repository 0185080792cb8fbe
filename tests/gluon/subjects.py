"""The kernels in which bugs are planted: how each is run and held against float64, and its bugs.

A subject is a file with kernels and a function that runs it. A kernel of the package is one too: its
file, a `run` for it, and a table of bugs; mutants.py takes any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastattn.ops.common.gluon import CLUSTERS, REDUCES
from oracle import assert_all_close_to_reference, assert_close_to_reference

from . import bugs, package
from .launching import launch

PROGRAMS = Path(__file__).with_name("programs")
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Subject:
    """A kernel's file, and how its mutants are tried.

    Attributes:
        path: the source, of which mutants are edits.
        run: (module, seed, **options of `launch`); the seed chooses schedule and shape too.
            It raises GluonError or AssertionError where the kernel is wrong.
        bugs: by name, a text of the source, which occurs once, and the wrong one in its place.
        shapes: so many seeds have every shape.
    """

    path: Path
    run: Callable[..., Any]
    bugs: Mapping[str, tuple[str, str]]
    shapes: int


# Batch, heads, heads of K and V, queries, keys, head_dim, causal: keys that end one short of a tile;
# masked and unmasked tiles; heads in groups; wide heads; rows that see no key; nothing ragged.
FORWARDS = [
    (2, 4, 2, 200, 191, 64, False),
    (1, 1, 1, 300, 350, 64, True),
    (1, 2, 1, 130, 320, 64, True),
    (1, 2, 2, 65, 400, 128, True),
    (1, 1, 1, 140, 14, 64, True),
    (1, 1, 1, 128, 384, 64, False),
]
# Queries, keys, head_dim, causal, and whether scores are so low that exp2(-lse) is infinite: keys
# that end inside a program's; rows that see no key; wide heads; nothing ragged.
BACKWARDS = [
    (256, 300, 64, False, False),
    (300, 200, 64, True, False),
    (391, 129, 128, True, False),
    (320, 128, 64, False, False),
    (256, 300, 64, False, True),
]


def attention(q: Any, k: Any, v: Any, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [B, S, H, D], in the inputs' type: the output, and the LSE in base 2 [B, H, S]."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        rows, columns = (torch.arange(n) for n in scores.shape[-2:])
        hidden = columns > rows[:, None] + (len(columns) - len(rows))
        scores = scores.masked_fill(hidden, -math.inf)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ v  # NaN: rows that see no key
    return out.transpose(1, 2), torch.logsumexp(scores, -1) * LOG2E


def run_forward(module: ModuleType, seed: int, shape: Any = None, **options: Any) -> None:
    """programs/forward.py by a seed."""
    b, h, hk, sq, sk, d, causal = shape or FORWARDS[seed % len(FORWARDS)]
    stages = 1 + (seed + seed // len(FORWARDS)) % 3
    torch.manual_seed(seed)
    q = torch.randn(b, sq, h, d).bfloat16()
    k, v = (torch.randn(b, sk, hk, d).bfloat16() for _ in range(2))
    out = torch.full((b, sq, h, d), math.nan).bfloat16()
    lse = torch.full((b, h, sq), math.nan)
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    boxes = [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 64, 1, d], layout)
        for x in (q, k, v, out)
    ]
    numbers = (sq, sk, h, h // hk, LOG2E / math.sqrt(d), d, 64, 64, stages, causal)
    launch(module.kernel, (-(-sq // 128), h, b), *boxes, lse, *numbers, seed=seed, **options)
    reference, eager = (attention(*(x.to(t) for x in (q, k, v)), causal) for t in (torch.float64, torch.float32))  # fmt: skip
    rounded = attention(q, k, v, causal)[0]
    assert_close_to_reference(out, rounded, reference[0], name="out")
    assert_close_to_reference(lse, eager[1], reference[1], name="lse")


def run_backward(module: ModuleType, seed: int, shape: Any = None, **options: Any) -> None:
    """programs/backward.py by a seed."""
    sq, sk, d, causal, low = shape or BACKWARDS[seed % len(BACKWARDS)]
    torch.manual_seed(seed)
    q, do = (torch.randn(1, sq, 1, d) for _ in range(2))
    k, v = (torch.randn(1, sk, 1, d) for _ in range(2))
    q, k = q + 4.0 * low, k - 4.0 * low
    q, k, v, do = (x.bfloat16() for x in (q, k, v, do))
    (reference, out, lse), (eager, _, _) = (
        gradients(q, k, v, do, causal, t) for t in (torch.float64, torch.bfloat16)
    )
    delta = (out * do.double()).sum(-1).flatten().float()
    dq, dk, dv = torch.zeros(sq, d), *(torch.full((sk, d), math.nan).bfloat16() for _ in range(2))
    scale = 1 / math.sqrt(d)
    numbers = (sq, sk, d, scale, scale * LOG2E, d, 64, 1 + seed // len(BACKWARDS) % 2, causal)
    tensors = (q, k, v, do, dq, dk, dv, lse.flatten().float(), delta)
    options = {"resident": 1 + seed % 2, **options}
    launch(module.kernel, (-(-sk // 128),), *tensors, *numbers, seed=seed, **options)
    ours = {"dq": dq, "dk": dk, "dv": dv}
    results = {n: (x, eager[n], reference[n]) for n, x in ours.items()}
    assert_all_close_to_reference(results)


def gradients(q: Any, k: Any, v: Any, do: Any, causal: bool, dtype: torch.dtype) -> Any:
    """Of one head: dq, dk, dv [S, D] by name, the output and the LSE in base 2."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, causal)
    found = torch.autograd.grad(out, (q, k, v), do.to(dtype))
    named = {n: x.flatten(0, 2).nan_to_num(0.0) for n, x in zip(("dq", "dk", "dv"), found)}
    return named, out.detach(), lse.detach()


ALL = {
    "forward": Subject(PROGRAMS / "forward.py", run_forward, bugs.FORWARD, len(FORWARDS)),
    "backward": Subject(PROGRAMS / "backward.py", run_backward, bugs.BACKWARD, len(BACKWARDS)),
    "attention forward": Subject(
        package.ROOM / "forward.py",
        package.run_forward,
        bugs.PACKAGE_FORWARD,
        len(package.FORWARDS),
    ),
    "attention backward": Subject(
        package.ROOM / "backward.py",
        package.run_backward,
        bugs.PACKAGE_BACKWARD,
        len(package.BACKWARDS),
    ),
    "products": Subject(
        package.PRODUCTS,
        package.run_product,
        bugs.PRODUCTS | (bugs.CLUSTERS if CLUSTERS else {}),
        len(package.PRODUCT_SHAPES),
    ),
    "ffn forward": Subject(
        package.FFN / "forward.py", package.run_ffn, bugs.PACKAGE_FFN, len(package.FFNS)
    ),
    "ffn backward": Subject(
        package.FFN / "backward.py",
        package.run_derivative,
        bugs.PACKAGE_FFN_BACKWARD,
        len(package.DERIVATIVES),
    ),
    "loss forward": Subject(
        package.LOSS / "forward.py",
        package.run_loss,
        bugs.PACKAGE_LOSS | (bugs.LOSS_CLUSTERS if CLUSTERS else {}),
        len(package.LOSSES),
    ),
    "loss backward": Subject(
        package.LOSS / "backward.py",
        package.run_loss_backward,
        bugs.PACKAGE_LOSS_BACKWARD | (bugs.LOSS_CLUSTERS if CLUSTERS else {}),
        len(package.LOSSES),
    ),
}
# Without those that add by TMA where the installed Triton cannot.
SUBJECTS = {
    name: subject
    for name, subject in ALL.items()
    if REDUCES or "async_atomic_add" not in subject.path.read_text()
}
