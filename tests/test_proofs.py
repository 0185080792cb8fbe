"""The proofs that the ops give: right kernels pass, each planted bug is found, nothing is vacuous."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backends, proving
from fastattn.ops.attention import proof as attention_proof
from fastattn.ops.ffn import proof as ffn_proof

HALF = torch.float16


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that are quick on a CPU, still of more than a tile and no multiple of one."""
    for name, size in (("QUERIES", 37), ("KEYS", 69), ("DOCUMENT", 17), ("LEFT", 21), ("RIGHT", 9)):
        monkeypatch.setattr(attention_proof, name, size)
    for name, size in (("TOKENS", 37), ("IN_FEATURES", 40), ("HIDDEN", 72), ("OUT_FEATURES", 56)):
        monkeypatch.setattr(ffn_proof, name, size)


def qkv(
    grad: bool = False, dtype: torch.dtype = HALF, queries: int = 3
) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(1, queries, 4, 16, dtype=dtype, requires_grad=grad)
    return q, torch.zeros(1, 7, 2, 16, dtype=dtype), torch.zeros(1, 7, 2, 16, dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(**more: Any) -> tuple[Any, ...]:
    q, k, v = qkv(True)
    return fastattn.attention_varlen, (q[0], k[0], v[0], ints(0, 3), ints(0, 7)), more


def ffn(dtype: torch.dtype = HALF, grad: bool = True, gated: bool = False) -> tuple[Any, ...]:
    x, w = torch.zeros(2, 6, dtype=dtype), torch.zeros(8, 6, dtype=dtype, requires_grad=grad)
    b = torch.zeros(8, dtype=dtype)
    gate = {"gate": w, "gate_bias": b, "activation": "silu"} if gated else {}
    return fastattn.ffn, (x, w, b, w.t(), b[:6]), gate


NORM = (torch.zeros(2, 24), torch.zeros(24))
DOCUMENTS = {"document_ids": (ints(*[0] * 3)[None], ints(*[0] * 7)[None])}
FULL = {
    "causal": True, "return_lse": True, "sink": torch.zeros(4), "alibi_slopes": torch.zeros(4),
    "bias": torch.zeros(3, 7), "key_lengths": ints(5),
}  # fmt: skip
BAND = {"window": (1, 1), "softcap": 2.0, "mask": torch.ones(3, 7, dtype=torch.bool)}

CALLS: dict[str, tuple[Any, ...]] = {
    "attention": (fastattn.attention, qkv(), {}),
    "attention float32": (fastattn.attention, qkv(dtype=torch.float32), {"causal": True}),
    "one query": (fastattn.attention, qkv(queries=1), {"return_lse": True}),
    "gradients": (fastattn.attention, qkv(True), {"causal": True}),
    "top-left": (fastattn.attention, qkv(), {"causal": "top_left"}),
    "features": (fastattn.attention, qkv(True), FULL),
    "gradient of a bias": (
        fastattn.attention,
        qkv(),
        {"bias": torch.zeros(3, 7, requires_grad=True)},
    ),
    "window": (fastattn.attention, qkv(True), BAND),
    "documents": (fastattn.attention, qkv(True), DOCUMENTS | {"window": (1, 1)}),
    "packed": packed(causal=True, return_lse=True),
    "packed, used": packed(seqused_q=ints(3), seqused_k=ints(7), sink=torch.zeros(4)),
    "packed documents": packed(document_ids=(ints(0, 0, 0), ints(*[0] * 7)), causal="top_left"),
    "layer_norm": (fastattn.layer_norm, (*NORM, NORM[1]), {}),
    "layer_norm, mixed": (fastattn.layer_norm, (NORM[0].half(), NORM[1], None, 1e-5, NORM[0]), {}),
    "layer_norm, 16-bit weight": (fastattn.layer_norm, (NORM[0], NORM[1].half()), {}),
    "rms_norm": (fastattn.rms_norm, (NORM[0].half(), NORM[1].half(), None, NORM[0].half()), {}),
    "ffn": ffn(),
    "ffn float32": ffn(torch.float32, False),
    "ffn gated": ffn(gated=True),
}


def compared(call: tuple[Any, ...]) -> tuple[bool, str]:
    function, args, kwargs = call
    problem, _ = backends.problem_of(function, *args, **kwargs)
    about = proving.subject("triton", problem)
    assert about is not None
    return proving._compared(about, problem)


@pytest.mark.parametrize("name", CALLS)
def test_right_kernels_pass(name: str) -> None:
    passed, told = compared(CALLS[name])
    assert passed, told


@pytest.mark.parametrize("name", CALLS)
def test_no_result_is_vacuous(name: str) -> None:
    """Most elements of each result and gradient are of the size of the largest one."""
    function, args, kwargs = CALLS[name]
    problem, _ = backends.problem_of(function, *args, **kwargs)
    proof = proving._proofs[problem.op]
    inputs = proof.inputs(problem, lambda *shape, dtype=torch.float64: torch.randn(shape).to(dtype))
    inputs = proving._cast(inputs, torch.float64)
    found = proving._results(lambda given: proof.formula(problem, given), inputs)
    assert any(name[0] == "d" for name in found) == (
        getattr(problem, "needs_grad", True) is not False
    )
    for result, x in found.items():
        seen = x.masked_fill(x.isinf(), 0.0).abs()
        assert (seen > 1e-3 * seen.max()).double().mean() > 0.4, result


def off_by_a_percent(x: torch.Tensor) -> torch.Tensor:
    return x * 1.02


def last_element(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[-1] = 100.0
    return x


@pytest.mark.parametrize("bug", [off_by_a_percent, last_element])
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("name", ["features", "layer_norm, mixed", "ffn"])
def test_planted_bugs_are_found(
    name: str, which: str, bug: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    function, args, kwargs = CALLS[name]
    op = "layer_norm" if "norm" in name else "ffn" if "ffn" in name else "attention"
    kernels = importlib.import_module(f"fastattn.ops.{op}.triton")
    run = getattr(kernels, which)

    def wrong(*args: Any) -> Any:
        first, *rest = run(*args)
        return bug(first), *rest

    monkeypatch.setattr(kernels, which, wrong)
    passed, told = compared((function, args, kwargs))
    assert not passed
    assert told.startswith(
        "out: " if which == "forward" else "dq: " if op == "attention" else "dx: "
    )


def test_families_are_told_apart() -> None:
    """By all that selects a kernel, and by no length."""
    families = {}
    for name, (function, args, kwargs) in CALLS.items():
        problem, _ = backends.problem_of(function, *args, **kwargs)
        families[name] = problem.op, proving._proofs[problem.op].family(problem)
    assert len(set(families.values())) == len(CALLS)
    longer = backends.problem_of(fastattn.attention, *(x.repeat(2, 9, 1, 1) for x in qkv()))[0]
    assert attention_proof.family(longer) == families["attention"][1]


def test_no_proof_is_said() -> None:
    for call in ({"dropout_p": 0.5}, {"block_mask": None}):
        problem, _ = backends.problem_of(fastattn.attention, *qkv(), **call)
        assert (attention_proof.family(problem) is None) == ("dropout_p" in call)
    empty = backends.problem_of(fastattn.attention, *(x[:, :0] for x in qkv()))[0]
    assert attention_proof.family(empty) is None
