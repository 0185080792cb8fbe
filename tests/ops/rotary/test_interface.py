"""The boundary of `rotary`: errors, dispatch, registration, and the ways torch looks through it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ops import laws
from ops.rotary.cases import BACKENDS, Case

import fastattn

Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
ANGLES = torch.randn(2, 5, 8)
TABLE = torch.randn(9, 4)
W = torch.randn(8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor; got list"),
        ({"q": Q[0]}, ValueError, r"q must have the shape \(batch, seqlen, heads, head_dim\); got"),
        ({"q": Q.int()}, TypeError, "q must have one of the dtypes float16, .* got int32: cast"),
        ({"q": Q.to_sparse()}, TypeError, r"q must be a dense tensor.*q.to_dense\(\)"),
        ({"q": torch.nested.nested_tensor([Q[0]])}, TypeError, "q is a nested tensor.*pad it"),
        ({"k": None}, TypeError, "k must be a torch.Tensor; got NoneType"),
        ({"k": K.half()}, TypeError, "k must have q's dtype float32; got float16"),
        ({"k": K[:1]}, ValueError, "k must have the batch, seqlen and head_dim of q"),
        ({"k": K.transpose(1, 2)}, ValueError, r"give x.transpose\(1, 2\) where heads come before"),
        ({"k": K.to("meta")}, ValueError, "k must be on the device of q, cpu; got meta"),
        ({"cos": ANGLES[..., :4]}, ValueError, r"sin must have cos's shape \(2, 5, 4\)"),
        ({"cos": ANGLES.to("meta")}, ValueError, "cos must be on the device of q"),
        ({"angles": ANGLES.long()}, TypeError, "cos must have one of the dtypes"),
        ({"angles": ANGLES[:, :3]}, ValueError, r"must be \(2 or 1, 5, width\), .* got \(2, 3, 8\)"),
        ({"angles": W}, ValueError, r"a table \(positions, width\), or \(batch or 1, seqlen, width\)"),
        ({"angles": TABLE[:4]}, ValueError, "must reach position 4 of q's 5; they have 4"),
        ({"angles": ANGLES[..., :2]}, ValueError, r"give rotary_dim=2 .* or rotary_dim=4"),
        ({"angles": ANGLES[..., :3]}, ValueError, r"for head_dim 8: give rotary_dim=6"),
        ({"angles": ANGLES[..., :7]}, ValueError, "rotary_dim / 2 wide, .* got 7"),
        ({"angles": torch.randn(2, 5, 10)}, ValueError, "at most head_dim 8; got 10"),
        ({"angles": ANGLES[..., :0]}, ValueError, "at most head_dim 8; got 0"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim must be even, .* at most head_dim 8; got 3"),
        ({"rotary_dim": 10}, ValueError, "rotary_dim must be even, .* at most head_dim 8; got 10"),
        ({"rotary_dim": 4}, ValueError, "must be rotary_dim 4 or its half 2 wide; got 8"),
        ({"rotary_dim": 4.0}, TypeError, "rotary_dim must be an int or None; got float"),
        ({"positions": torch.arange(5)}, ValueError, "leave positions out"),
        ({"angles": TABLE, "positions": torch.arange(4)}, ValueError, r"positions must be \(5,\)"),
        ({"angles": TABLE, "positions": torch.zeros(5)}, TypeError, "positions must be int32 or"),
        ({"angles": TABLE, "positions": [0]}, TypeError, "positions must be a torch.Tensor or None"),
        ({"angles": TABLE, "positions": torch.arange(5) + 5}, ValueError, "from 0 to 8, .* 5 to 9"),
        ({"angles": TABLE, "positions": torch.arange(5) - 1}, ValueError, "they go from -1 to 3"),
        ({"q_weight": W[:7]}, ValueError, r"q_weight must have the shape \(head_dim,\) = \(8,\)"),
        ({"k_weight": W.int()}, TypeError, "k_weight must have one of the dtypes"),
        ({"eps": -1.0}, ValueError, "eps must not be negative; got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite; got nan"),
        ({"weight_offset": "1"}, TypeError, "weight_offset must be a float; got str"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'gluon', 'cuda', 'triton', .* got 'fast'"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"q": Q, "k": K, "cos": ANGLES, "sin": ANGLES, **changes}
    if "angles" in given:
        given["cos"] = given["sin"] = given.pop("angles")
    for _ in range(2):  # an error is not forgotten by the cache of plans
        with pytest.raises(error, match=message):
            fastattn.rotary(**given)


def test_positions_are_looked_at_in_every_call() -> None:
    """Also where the call has a plan already."""
    fastattn.rotary(Q, K, TABLE, TABLE, positions=torch.arange(5))
    with pytest.raises(ValueError, match="they go from 6 to 10"):
        fastattn.rotary(Q, K, TABLE, TABLE, positions=torch.arange(5) + 6)


@pytest.mark.parametrize(
    ("q", "angles", "reason"),
    [
        (Q.double(), ANGLES, "float64 would lose precision"),
        (Q, ANGLES.double(), "float64 would lose precision"),
        (Q, ANGLES.clone().requires_grad_(), "no gradient for cos and sin"),
        (torch.randn(1, 1, 1, 4098), torch.randn(1, 4098), "a head_dim up to 4096; got 4098"),
    ],
)
def test_what_the_kernels_decline(q: torch.Tensor, angles: torch.Tensor, reason: str) -> None:
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        fastattn.rotary(q, q, angles, angles, backend="triton")
    fastattn.rotary(q, q, angles, angles)  # left open, another backend takes it


def test_there_is_no_cuda_backend() -> None:
    with pytest.raises(fastattn.UnsupportedError, match="rotary has no cuda backend"):
        fastattn.rotary(Q, K, ANGLES, ANGLES, backend="cuda")


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    given = Q.half(), K.half(), ANGLES, ANGLES
    explanation = fastattn.explain(fastattn.rotary, *given, interleaved=True, q_weight=W)
    assert capsys.readouterr().out.strip() == str(explanation)
    assert explanation.backend == "torch"
    assert explanation.problem == (
        "q (2, 5, 4, 8), k (2, 5, 2, 8) float16, 8 elements in interleaved pairs, cos float32, "
        "norm of q float32, on cpu"
    )


def test_no_plan_is_taken_for_another() -> None:
    cases = [
        Case(full=True),
        Case(full=True, interleaved=True),
        Case(full=True, norms="q"),
        Case(full=True, norms="q", eps=0.5),
        Case(full=True, norms="q", weight_offset=1.0),
        Case(full=True, norms="k"),
        Case(rotary_dim=8, angles="positions"),
        Case(rotary_dim=8, full=True, angles="positions"),
        Case(dtype=torch.float64, full=True),
    ]
    for _ in range(2):
        for case in cases:
            tensors = case.inputs()
            torch.testing.assert_close(case.ours(None, tensors), case.eager(tensors))


def test_autocast_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k = Q.to(dtype), K.to(dtype)
        for backend in BACKENDS:
            expected = fastattn.rotary(q, k, ANGLES, ANGLES, backend=backend)
            with torch.autocast("cpu", torch.bfloat16):
                ours = fastattn.rotary(q, k, ANGLES, ANGLES, backend=backend)
            for x, y in zip(ours, expected, strict=True):
                assert x.dtype == dtype
                assert torch.equal(x, y)


def test_meta_tensors() -> None:
    q, k, angles = (x.to("meta") for x in (Q, K, ANGLES))
    for backend in (None, "torch", "reference"):
        for x, y in zip(
            fastattn.rotary(q, k, angles, angles, backend=backend), (q, k), strict=True
        ):
            assert x.shape == y.shape and x.dtype == y.dtype and x.is_meta


@pytest.mark.parametrize(
    "case",
    [
        Case(before=True, full=True),
        Case(norms="qk", angles="positions"),
        Case(norms="k", rotary_dim=8),
    ],
    ids=("plain", "norms", "norm of k"),
)
def test_opcheck(case: Case, device: str) -> None:
    case.device = device
    tensors = case.inputs()
    q, k = tensors["q"].requires_grad_(), tensors["k"].requires_grad_()
    rest = [tensors.get(n) for n in ("cos", "sin", "positions", "q_weight", "k_weight")]
    settings = case.rotated, case.interleaved, case.eps, case.weight_offset
    laws.opcheck(torch.ops.fastattn.rotary, q, k, *rest, *settings, "triton", True)
    kept = [x.detach() if name in case.norms else None for name, x in (("q", q), ("k", k))]
    wanted = [name in case.norms for name in "qk"]
    arguments = (torch.randn_like(q), torch.randn_like(k), *kept, *rest, *settings, *wanted)
    laws.opcheck(torch.ops.fastattn.rotary_backward, *arguments, "triton", True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    weight = torch.randn(16, device=device, requires_grad=True)
    table = torch.randn(23, 8, device=device)

    def step(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # A default that is a float is a symbol under dynamic=True, for which aot begins again.
        options = {"eps": 1e-6, "weight_offset": 0.0, "backend": backend}
        q, k = fastattn.rotary(q, k, table, table, positions=positions, q_weight=weight, **options)
        return q.square().sum() + k.pow(3).sum()

    def draw(n: int) -> list[torch.Tensor]:
        qk = [torch.randn(2, n, heads, 16, device=device, requires_grad=True) for heads in (4, 2)]
        return [*qk, torch.randint(0, 23, (2, n), device=device)]

    laws.one_graph(step, draw, [weight])


@pytest.mark.parametrize("backend", (None, "torch", "reference"))
@pytest.mark.parametrize("interleaved", (False, True))
def test_functional_transforms(interleaved: bool, backend: str | None) -> None:
    case = Case(interleaved=interleaved, norms="q", dtype=torch.float64)
    tensors = case.inputs()
    laws.functional_transforms(
        lambda q: case.ours(backend, tensors | {"q": q})[0],
        lambda q: case.eager(tensors | {"q": q})[0],
        tensors["q"],
    )


def test_kernels_refuse_transforms(device: str) -> None:
    angles = ANGLES.to(device)
    laws.kernels_refuse_transforms(
        lambda q: fastattn.rotary(q, q, angles, angles, backend="triton")[0], Q.to(device)
    )


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 2, 1, 6, norms="qk", dtype=torch.float64),
        Case(1, 2, 1, 2, 6, 4, True, True, dtype=torch.float64, angles="positions"),
    ],
    ids=("norms", "interleaved"),
)
def test_first_and_second_derivatives(case: Case, backend: str) -> None:
    tensors = case.inputs()
    positions = tensors.pop("positions", None)
    names, leaves = [*tensors], [x.requires_grad_() for x in tensors.values()]

    def function(*leaves: torch.Tensor) -> Any:
        given = dict(zip(names, leaves, strict=True))
        return case.ours(backend, given if positions is None else given | {"positions": positions})

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("norms", ("", "q", "qk"))
def test_second_derivative_through_the_kernels(norms: str, device: str) -> None:
    case = Case(1, 3, 2, 1, 8, norms=norms, device=device)
    fixed = case.inputs()
    names = ["q", "k", *(f"{name}_weight" for name in norms)]

    def rotary(backend: str, *tensors: torch.Tensor) -> Any:
        return case.ours(backend, fixed | dict(zip(names, tensors, strict=True)))

    ours, reference = (functools.partial(rotary, name) for name in ("triton", "reference"))
    cotangents = [torch.randn_like(fixed[name]) for name in "qk"]
    # The squares of a rotated vector do not depend on the angle.
    laws.second_derivative(ours, reference, [fixed[name] for name in names], cotangents, power=3)


def test_batched_cotangents(device: str) -> None:
    k, angles = Q.to(device), ANGLES.to(device)

    def rotary(backend: str, q: torch.Tensor) -> torch.Tensor:
        return fastattn.rotary(q, k, angles, angles, backend=backend)[0]

    ours, reference = (functools.partial(rotary, name) for name in ("triton", "reference"))
    laws.batched_cotangents(ours, reference, Q.to(device))


@pytest.mark.parametrize("norms", ("", "q"))
def test_what_is_kept_for_the_backward(norms: str, device: str) -> None:
    """cos and sin; x only where there is a norm, and no result."""
    case = Case(norms=norms, device=device)
    tensors = case.inputs()
    tensors["q"].requires_grad_()
    kept = laws.kept(lambda: case.ours("triton", tensors))
    expected = [tensors[name] for name in ("cos", "sin", *(("q", "q_weight") if norms else ()))]
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in expected)
