"""`rotary` on every backend against float64."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from ops import laws
from ops.rotary.cases import BACKENDS, Case, check

import fastattn
from fastattn.ops.rotary import aten

# torch's own rms_norm says that mixed dtypes are not fused.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

CASES = {
    "Llama": Case(heads=8, kv_heads=2, head_dim=64, full=True, before=True),
    "GPT-NeoX": Case(head_dim=64, rotary_dim=16, full=True, before=True),
    "GPT-J": Case(heads=4, kv_heads=4, rotary_dim=8, interleaved=True, angles="positions"),
    "Cohere": Case(head_dim=64, full=True, interleaved=True),
    "GLM": Case(head_dim=64, rotary_dim=32, interleaved=True),
    "Qwen3": Case(heads=8, kv_heads=2, head_dim=128, full=True, norms="qk", before=True),
    "Gemma 3": Case(full=True, norms="qk", weight_offset=1.0),
    "one token": Case(batch=1, seqlen=1),
    "two elements": Case(head_dim=2),
    "odd heads": Case(heads=7, kv_heads=5, head_dim=6),
    "odd rest": Case(head_dim=21, rotary_dim=10),
    "odd rest, interleaved": Case(head_dim=21, rotary_dim=10, interleaved=True, full=True),
    "rest longer than what is rotated": Case(head_dim=80, rotary_dim=6, norms="q"),
    "more k than q": Case(heads=1, kv_heads=9),
    "one sequence of angles": Case(angles="shared", full=True),
    "table": Case(angles="table"),
    "table, an angle for each element": Case(angles="table", full=True, interleaved=True),
    "positions": Case(angles="positions", norms="qk"),
    "one row of positions": Case(angles="one row of positions", full=True),
    "norm of q": Case(norms="q"),
    "norm of k": Case(norms="k", rotary_dim=8, interleaved=True, head_dim=24),
    "large eps": Case(norms="qk", eps=1.0),
    "large head": Case(head_dim=576, rotary_dim=64, norms="k"),
    "float16": Case(dtype=HALF, norms="qk"),
    "bfloat16": Case(dtype=BF16, full=True),
    "bfloat16, interleaved": Case(dtype=BF16, interleaved=True, norms="qk", weight_offset=1.0),
    "float32 angles": Case(dtype=BF16, angle_dtype=FLOAT),
    "lower angles": Case(dtype=FLOAT, angle_dtype=BF16),
    "float32 weights": Case(dtype=HALF, weight_dtype=FLOAT, norms="qk"),
    "lower weights": Case(dtype=FLOAT, weight_dtype=BF16, norms="qk"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, backend: str, device: str) -> None:
    check(dataclasses.replace(CASES[name], device=device), backend)


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize("name", ("Llama", "GPT-J", "table", "one row of positions", "Gemma 3"))
def test_gradients_of_cos_and_sin(name: str, backend: str, device: str) -> None:
    check(dataclasses.replace(CASES[name], device=device), backend, wanted="all")


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize("name", ("Llama", "GPT-J", "Gemma 3"))
def test_float64(name: str, backend: str, device: str) -> None:
    check(dataclasses.replace(CASES[name], dtype=DOUBLE, device=device), backend)
    check(dataclasses.replace(CASES[name], angle_dtype=DOUBLE, device=device), backend)


@pytest.mark.parametrize("name", CASES)
def test_in_place_of_a_temporary(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `torch` backend's way for large tensors."""
    monkeypatch.setattr(aten, "LEAST_IN_PLACE", 0)
    case = dataclasses.replace(CASES[name], device=device)
    check(case, "torch")
    with torch.no_grad():
        torch.testing.assert_close(
            case.ours("torch", case.inputs()), case.eager(case.inputs()), rtol=2e-2, atol=2e-2
        )


def test_large_tensors_have_every_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the function in place, whose backward is itself."""
    monkeypatch.setattr(aten, "LEAST_IN_PLACE", 0)
    case = Case(kv_heads=3, dtype=DOUBLE)

    def derivatives(function: Any) -> list[torch.Tensor]:
        tensors = case.inputs()
        q = tensors["q"].requires_grad_()
        out, _ = function(tensors)
        (first,) = torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), q, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), q, retain_graph=True)
        rows = torch.autograd.grad(out, q, torch.ones(2, *out.shape).to(q), is_grads_batched=True)
        return [first, second, third, *rows]

    ours = derivatives(lambda tensors: case.ours("torch", tensors))
    torch.testing.assert_close(ours, derivatives(case.eager))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.long] * (n > 5)) for n in range(24)]
)
def test_random_problems(seed: int, backend: str, device: str) -> None:
    r = random.Random(seed)
    head_dim = r.choice((r.randint(2, 40), r.randint(2, 300), 64))
    dtype = r.choice((HALF, BF16, FLOAT))
    case = Case(
        batch=r.randint(1, 3),
        seqlen=r.randint(1, 9),
        heads=r.randint(1, 9),
        kv_heads=r.randint(1, 9),
        head_dim=head_dim,
        rotary_dim=2 * r.randint(1, head_dim // 2),
        full=r.random() < 0.5,
        interleaved=r.random() < 0.5,
        angles=r.choice(("tokens", "shared", "table", "positions", "one row of positions")),
        norms=r.choice(("", "", "q", "k", "qk")),
        weight_offset=r.choice((0.0, 1.0)),
        eps=r.choice((1e-6, 1e-3)),
        dtype=dtype,
        angle_dtype=r.choice((dtype, FLOAT)),
        weight_dtype=r.choice((dtype, FLOAT)),
        before=r.random() < 0.5,
        device=device,
        seed=seed,
    )
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str, device: str) -> None:
    case = Case(batch=2, seqlen=6, heads=4, kv_heads=4, norms="q", device=device)
    inputs = case.inputs()
    joint = torch.randn(2, 6, 3, 4, 16, device=device)
    for x in (
        joint[:, :, 1],  # of a joint projection
        torch.randn(2, 4, 6, 16, device=device).transpose(1, 2),
        torch.randn(2, 6, 4, 17, device=device)[..., 1:],  # not aligned
        torch.randn(2, 6, 4, 32, device=device)[..., ::2],  # last dimension strided
        torch.randn(16, 4, 6, 2, device=device).permute(3, 2, 1, 0),
        torch.randn(1, 1, 1, 16, device=device).expand(2, 6, 4, 16),
        torch.randn(2, 6, 4, 1, device=device).expand(2, 6, 4, 16),
    ):
        check(case, backend, inputs | {"q": x})
        check(case, backend, inputs | {"k": x})
    cos = torch.randn(6, 2, 16, device=device).transpose(0, 1)[..., ::2]
    check(case, backend, inputs | {"cos": cos})
    check(case, backend, inputs | {"sin": torch.randn(1, 6, 8, device=device).expand(2, 6, 8)})
    check(case, backend, inputs | {"q_weight": torch.randn(32, device=device)[::2]})
    of_positions = dataclasses.replace(case, angles="positions")
    inputs = of_positions.inputs()
    positions = torch.randint(0, 9, (6, 2), dtype=torch.int32, device=device).t()
    check(of_positions, backend, inputs | {"positions": positions})
    check(of_positions, backend, inputs | {"positions": positions[1]})


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_heads_before_the_sequence_are_not_copied(backend: str, device: str) -> None:
    """And the results lie as the inputs do, which what follows expects."""
    case = Case(before=True, full=True, device=device)
    tensors = case.inputs()
    with laws.Operands("clone", "_to_copy") as copies:
        q, k = case.ours(backend, tensors)
    large = [x for x in copies.seen if x.numel() >= tensors["k"].numel()]
    assert not large
    assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [{"batch": 0}, {"seqlen": 0}, {"heads": 0}, {"kv_heads": 0}, {"heads": 0, "kv_heads": 0}],
    ids=str,
)
def test_empty(changes: dict[str, int], backend: str, device: str) -> None:
    """Nothing in, nothing out; the weights' gradients are zeros, not garbage."""
    for angles in ("tokens", "positions"):
        case = Case(norms="qk", angles=angles, device=device, **changes)
        for name, value in check(case, backend).items():
            if name.endswith("weight") and (case.batch == 0 or case.seqlen == 0):
                assert not value.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_head_stays_alone(backend: str, device: str) -> None:
    case = Case(heads=4, norms="q", device=device)
    tensors = case.inputs()
    clean, _ = case.ours(backend, tensors)
    tensors["q"] = tensors["q"].clone()
    tensors["q"][0, 1, 2, 3], tensors["q"][1, 4, 3, 0] = float("nan"), float("inf")
    out, _ = case.ours(backend, tensors)
    good = torch.ones(2, 5, 4, dtype=torch.bool, device=device)
    good[0, 1, 2] = good[1, 4, 3] = False
    assert torch.equal(out[good], clean[good])
    assert out[0, 1, 2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_heads_under_a_norm(backend: str, device: str) -> None:
    case = Case(norms="qk", device=device)
    tensors = case.inputs()
    tensors["q"] = torch.zeros_like(tensors["q"], requires_grad=True)
    out, _ = case.ours(backend, tensors)
    (grad,) = torch.autograd.grad(out.sum(), tensors["q"])
    assert not out.any() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("q",), ("k",), ("q_weight",), ("k_weight", "q")])
def test_gradients_of_some_inputs_alone(wanted: tuple[str, ...], backend: str, device: str) -> None:
    case = Case(norms="qk", device=device)
    cotangents = [case.inputs()[name].cos() for name in "qk"]

    def grads(function: Any) -> tuple[torch.Tensor, ...]:
        leaves = {n: x.requires_grad_(n in wanted) for n, x in case.inputs().items()}
        outs = function(leaves)
        given = [(y, dy) for y, dy in zip(outs, cotangents, strict=True) if y.requires_grad]
        return torch.autograd.grad(
            [y for y, _ in given], [leaves[n] for n in wanted], [dy for _, dy in given]
        )

    torch.testing.assert_close(grads(lambda t: case.ours(backend, t)), grads(case.eager))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_through_one_result_alone(backend: str, device: str) -> None:
    case = Case(norms="k", device=device)
    for used in (0, 1):
        tensors = case.inputs()
        leaves = [tensors[n].requires_grad_() for n in ("q", "k", "k_weight")]
        out = case.ours(backend, tensors)[used]
        expected = case.eager(tensors)[used]
        grads, wanted = (
            torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True, allow_unused=True)
            for y in (out, expected)
        )
        torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("norms", ("", "qk"))
def test_same_inputs_same_bits(norms: str, device: str) -> None:
    case = Case(seqlen=40, heads=5, norms=norms, device=device)
    laws.same_bits(lambda: check(case, "triton"))


def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    case = Case(batch=3, seqlen=7, norms="qk", device=device)
    tensors = case.inputs()
    together = case.ours("triton", tensors)
    for b in range(3):
        one = {n: x[b : b + 1] if x.dim() > 1 else x for n, x in tensors.items()}
        for x, y in zip(case.ours("triton", one), together, strict=True):
            assert torch.equal(x[0], y[b])


def test_positions_that_nobody_has_looked_at_are_cut(device: str) -> None:
    """On a GPU, and while torch.compile traces: the same row on every backend, no foreign memory."""
    case = Case(angles="positions", device=device)
    tensors = case.inputs()
    tensors["positions"] = torch.tensor([[-3, 0, 22, 23, 10**6]] * 2, device=device)
    cut = tensors | {"positions": tensors["positions"].clamp(0, 22)}
    torch._dynamo.reset()
    for backend in BACKENDS:
        compiled = torch.compile(case.ours, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(backend, tensors), case.ours(backend, cut))


def test_the_two_ways_of_the_angles_agree(device: str) -> None:
    """transformers' position_embeddings, an angle for each element, against one for each pair."""
    case = Case(device=device)
    tensors = case.inputs()
    twice = {name: torch.cat((tensors[name],) * 2, -1) for name in ("cos", "sin")}
    torch.testing.assert_close(
        fastattn.rotary(**tensors | twice), fastattn.rotary(**tensors), rtol=0, atol=0
    )
