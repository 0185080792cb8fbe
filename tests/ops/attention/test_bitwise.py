"""Equal bits: of repeated calls, of a sequence alone and within any batch, of dropout's choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ops.attention.cases import Case, Problem, call, runnable
from ops.backends import BACKENDS, widest

import fastattn
from fastattn.ops.attention import tiles
from fastattn.ops.common import dropout

KERNELS = ("triton", "cuda")
REPEATED = {
    "dense": Case(40, 70, heads=4, kv_heads=2, causal=True, bias=(1, 0, 1, 0), seed=1),
    "packed": Case(packed=((20, 33), (35, 10)), window=(9, 4), alibi="heads", bias=(1, 0, 1, 0)),
    "dropout": Case(30, 40, dropout_p=0.3, causal=True),
}


def bits(case: Case, problem: Problem, backend: str) -> list[torch.Tensor]:
    """Output, LSE where it has a gradient, and all gradients that the backend has."""
    constant = "bias" if backend == "cuda" else None
    leaves = {n: x.detach().requires_grad_(n != constant) for n, x in problem.tensors.items()}
    torch.manual_seed(case.seed)
    with_lse = backend != "torch"
    result = call(case, problem, backend, leaves, return_lse=with_lse)
    outputs = result if with_lse else (result,)
    torch.autograd.backward(outputs, (problem.dout, problem.dlse)[: len(outputs)])
    return [*outputs, *(x.grad for x in leaves.values() if x.requires_grad)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REPEATED)
def test_repeated_runs_give_the_same_bits(
    name: str, backend: str, device: str, request: pytest.FixtureRequest
) -> None:
    """In the emulator under another schedule each time."""
    case, runs = dataclasses.replace(REPEATED[name], device=device), 50
    if backend in KERNELS and device == "cpu":  # program after program: seconds each
        case = dataclasses.replace(case, batch=1, heads=2, kv_heads=1, head_dim=8)
        runs = 4
    case = runnable(case, backend)
    problem = case.draw()
    first = bits(case, problem, backend)
    for run in range(runs):
        if backend == "cuda":
            request.getfixturevalue("emulator").seed(run)
        assert all(map(torch.equal, first, bits(case, problem, backend)))


# The reduction order of a row follows only from its own lengths and the table of tiles.
INVARIANT = {
    "dense": Case(40, 90, batch=3, heads=4, kv_heads=2, causal=True),
    "decoding": Case(1, 150, batch=4, lengths=True),
    "features": Case(
        33, 70, batch=3, window=(20, 3), softcap=5.0, bias=(0, 0, 0, 0), alibi="batch"
    ),
}


def part(x: Any, b: int, batch: int) -> Any:
    """Sequence b of a tensor of the whole batch; what all share stays."""
    return x[b : b + 1] if isinstance(x, torch.Tensor) and x.shape[0] == batch else x


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", INVARIANT)
def test_a_sequence_alone_and_within_a_batch(name: str, backend: str, device: str) -> None:
    case = runnable(dataclasses.replace(INVARIANT[name], device=device), backend)
    problem = case.draw()
    whole = bits(case, problem, backend)
    for b in range(case.batch):
        alone = Problem(
            {name: part(x, b, case.batch) for name, x in problem.tensors.items()},
            {name: part(x, b, case.batch) for name, x in problem.options.items()},
            dout=problem.dout[b : b + 1],
            dlse=problem.dlse[b : b + 1],
        )
        assert all(map(torch.equal, (x[b : b + 1] for x in whole), bits(case, alone, backend)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("others", [((40, 40), (65, 100)), ((1, 130),), ((0, 0), (3, 3), (5, 0))])
def test_a_packed_sequence_alone_and_among_others(
    others: tuple[tuple[int, int], ...], backend: str, device: str
) -> None:
    """Neither the neighbours, nor the longest one, nor its place in the tensor change its bits."""
    mine = 33, 70
    options = {
        "causal": True, "heads": 2, "kv_heads": 1, "sink": True, "dtype": widest(backend),
        "device": device,
    }  # fmt: skip
    alone = Case(packed=(mine,), **options)
    expected_problem = alone.draw()
    expected = bits(alone, expected_problem, backend)
    for place in (0, len(others)):
        case = Case(packed=(*others[:place], mine, *others[place:]), **options)
        problem = case.draw()
        rows, columns = (problem.places(side)[place] for side in "qk")
        for name in ("q", "k", "v"):
            x, its = problem.tensors[name], expected_problem.tensors[name]
            x[rows if name == "q" else columns] = its
        problem.tensors["sink"] = expected_problem.tensors["sink"]
        problem.dout[rows] = expected_problem.dout
        problem.dlse[:, rows] = expected_problem.dlse
        out, lse, dq, dk, dv, _ = bits(case, problem, backend)
        ours = [out[rows], lse[:, rows], dq[rows], dk[columns], dv[columns]]
        assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_packed_sequence_has_the_bits_of_a_dense_one(backend: str, device: str) -> None:
    options = {"window": (30, 4), "dtype": widest(backend), "device": device}
    dense, packed = Case(33, 70, batch=1, **options), Case(packed=((33, 70),), **options)
    problem = dense.draw()
    same = packed.draw()
    same.tensors = {name: x[0] for name, x in problem.tensors.items()}
    same.dout, same.dlse = problem.dout[0], problem.dlse[0]
    expected = [x[0] for x in bits(dense, problem, backend)]
    assert all(map(torch.equal, bits(packed, same, backend), expected))


def test_dropout_is_the_same_for_all_tile_sizes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed decides, not how a kernel cuts the matrix: its weights, and so its gradients, agree."""
    case = Case(50, 70, batch=1, dropout_p=0.5, device=device)
    problem = case.draw()
    problem.tensors["v"] = torch.eye(70, device=device)[None, :, None].expand(1, 70, 2, 70)
    problem.dout = torch.ones(1, 50, 2, 70, device=device)
    torch.manual_seed(case.seed)
    seed = dropout.draw_seed(torch.device(device))
    kept = dropout.keep(seed, 0.5, 1, 2, 50, 70).transpose(1, 2)
    results = {}
    for side in (16, 32, 64):
        monkeypatch.setattr(tiles, "tile", lambda *a, n=side, **k: tiles.Tile(n, n, 4, 1))
        results[side] = bits(case, problem, "triton")
        assert torch.equal(results[side][0] != 0, kept)
    for other in (32, 64):
        for a, b in zip(results[16], results[other]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_follows_torchs_generator(backend: str, device: str) -> None:
    """The same seed gives the same bits, the next call others."""
    q, k = (torch.randn(2, n, 2, 16, device=device).to(widest(backend)) for n in (30, 40))

    def run() -> torch.Tensor:
        return fastattn.attention(q, k, k, dropout_p=0.5, backend=backend)

    torch.manual_seed(7)
    first, second = run(), run()
    torch.manual_seed(7)
    assert torch.equal(first, run()) and torch.equal(second, run())
    assert not torch.equal(first, second)
    torch.manual_seed(8)
    assert not torch.equal(first, run())
