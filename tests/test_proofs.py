"""The proofs that the ops give: right kernels pass, each planted bug is found, nothing is vacuous."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backends, measured, proving, verdicts
from fastattn.ops.attention import proof as attention_proof
from fastattn.ops.attention.cache import proof as cache_proof
from fastattn.ops.ffn import proof as ffn_proof
from fastattn.ops.linear import proof as linear_proof
from fastattn.ops.linear_cross_entropy import proof as head_proof
from fastattn.ops.rotary import proof as rotary_proof

HALF = torch.float16


SMALL: dict[Any, dict[str, Any]] = {
    attention_proof: {"QUERIES": 37, "KEYS": 69, "DOCUMENT": 17, "LEFT": 21, "RIGHT": 9},
    cache_proof: {
        "CAPACITY": 280, "LENGTHS": (265, 77), "PAGE": 24, "ROWS": (16,), "MANY_QUERIES": 33,
    },
    ffn_proof: {"TOKENS": 37, "IN_FEATURES": 40, "HIDDEN": 72, "OUT_FEATURES": 56},
    head_proof: {"ROWS": 37, "FEATURES": 40, "CLASSES": 136},
    linear_proof: {"TOKENS": 37, "IN_FEATURES": 40, "OUT_FEATURES": 72},
    rotary_proof: {"SEQLEN": 5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that are quick on a CPU, still of more than a tile and no multiple of one."""
    for module, sizes in SMALL.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


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


def blocks() -> fastattn.BlockMask:
    return fastattn.BlockMask.from_predicate(lambda b, h, i, j: i == j, 1, 1, 3, 7, block_size=32)


def ffn(
    dtype: torch.dtype = HALF, grad: bool = True, gated: bool = False, width: int = 6
) -> tuple[Any, ...]:
    x, w = torch.zeros(2, width, dtype=dtype), torch.zeros(16, width, dtype=dtype)
    w.requires_grad_(grad)
    b = torch.zeros(16, dtype=dtype)
    gate = {"gate": w, "gate_bias": b, "activation": "silu"} if gated else {}
    return fastattn.ffn, (x, w, b, w.t(), b[:width]), gate


def cache(
    queries: int = 3, stored: torch.dtype = HALF, dtype: torch.dtype = HALF, **more: Any
) -> tuple[Any, ...]:
    q, new = torch.zeros(1, queries, 4, 16, dtype=dtype), torch.zeros(1, 2, 2, 16, dtype=dtype)
    held = torch.zeros(1, 7, 2, 16, dtype=stored)
    if stored in (torch.int8, torch.float8_e4m3fn):
        more |= {"k_scale": torch.ones(2), "v_scale": torch.ones(2)}
    return fastattn.attention_with_kv_cache, (q, held, held, ints(5)), more | {"k": new, "v": new}


def loss(dtype: torch.dtype = HALF, grad: bool = True, **more: Any) -> tuple[Any, ...]:
    logits = torch.zeros(3, 24, dtype=dtype, requires_grad=grad)
    return fastattn.cross_entropy, (logits, torch.tensor([0, 5, 7])), more


def head(*wanted: str, dtype: torch.dtype = HALF, width: int = 6, **more: Any) -> tuple[Any, ...]:
    given = {
        "x": torch.zeros(3, width, dtype=dtype), "weight": torch.zeros(48, width, dtype=dtype),
        "bias": torch.zeros(48, dtype=dtype), "targets": torch.tensor([0, 5, 7]),
    }  # fmt: skip
    for name in wanted:
        given[name].requires_grad_()
    return fastattn.linear_cross_entropy, (), given | more


def rotary(dtype: torch.dtype = HALF, grad: bool = True, width: int = 8, **more: Any) -> Any:
    q = torch.zeros(1, 3, 2, 16, dtype=dtype, requires_grad=grad)
    cos = torch.zeros(1, 3, width) if width != 4 else torch.zeros(5, width)
    return fastattn.rotary, (q, q[:, :, :1], cos, cos), more


def linear(dtype: torch.dtype = HALF, grad: bool = True, width: int = 6) -> tuple[Any, ...]:
    x, weight = torch.zeros(2, width, dtype=dtype), torch.zeros(16, width, dtype=dtype)
    return fastattn.linear, (x, weight.requires_grad_(grad), weight[:, 0].detach(), "gelu"), {}


NORM = (torch.zeros(2, 24), torch.zeros(24))
DOCUMENTS = {"document_ids": (ints(*[0] * 3)[None], ints(*[0] * 7)[None])}
FULL = {
    "causal": True, "return_lse": True, "sink": torch.zeros(4), "alibi_slopes": torch.zeros(4),
    "bias": torch.zeros(3, 7), "key_lengths": ints(5),
}  # fmt: skip
BAND = {"window": (1, 1), "softcap": 2.0, "mask": torch.ones(3, 7, dtype=torch.bool)}

ANGLES: dict[str, Any] = {"rotary_cos": torch.zeros(9, 8), "rotary_sin": torch.zeros(9, 8)}

CALLS: dict[str, tuple[Any, ...]] = {
    "attention": (fastattn.attention, qkv(), {}),
    "attention float32": (fastattn.attention, qkv(dtype=torch.float32), {"causal": True}),
    "one query": (fastattn.attention, qkv(queries=1), {"return_lse": True}),
    "gradients": (fastattn.attention, qkv(True), {"causal": True}),
    "gradients in any order": (
        fastattn.attention,
        qkv(True),
        {"causal": True, "deterministic": False},
    ),
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
    "ffn aligned": ffn(width=16),
    "dropout": (fastattn.attention, qkv(True), {"dropout_p": 0.1, "causal": True}),
    "packed dropout": packed(dropout_p=0.1),
    "block mask": (fastattn.attention, qkv(True), {"block_mask": blocks(), "causal": True}),
    "row of a bias": (
        fastattn.attention,
        qkv(),
        {"bias": torch.zeros(1, 7, requires_grad=True)},
    ),
    "float32 beside half": (
        fastattn.attention,
        qkv(True),
        {"bias": torch.zeros(1, 7), "sink": torch.zeros(4)},
    ),
    "norm dropout": (fastattn.layer_norm, (*NORM, None, 1e-5, NORM[0]), {"dropout_p": 0.1}),
    "cache": cache(),
    "cache, one query": cache(1, sink=torch.zeros(4), alibi_slopes=torch.zeros(4)),
    "cache, paged": cache(block_table=ints(0)[None], window=(2, 0), softcap=4.0),
    "cache, rows": cache(cache_indices=ints(0), cache_starts=ints(1), causal=False),
    "cache, rotary": cache(**ANGLES),
    "cache of int8": cache(stored=torch.int8, **ANGLES),
    "cache of float8": cache(1, stored=torch.float8_e4m3fn),
    "cache, float32": cache(1, torch.int8, torch.float32, **ANGLES),
    "cross_entropy": loss(),
    "cross_entropy, all": loss(
        weight=torch.zeros(24), label_smoothing=0.1, z_loss=0.1, logit_scale=2.0, softcap=5.0
    ),
    "cross_entropy, float32": loss(torch.float32, False),
    "head": head("x", "weight", "bias"),
    "head, losses": head("x", "weight", "bias", reduction="none", label_smoothing=0.1),
    "head, aligned": head("weight", width=16, class_weight=torch.ones(48), softcap=5.0),
    "head, float32": head(dtype=torch.float32),
    "rotary": rotary(),
    "rotary, norms": rotary(q_weight=NORM[1][:16], k_weight=NORM[1][:16].half(), interleaved=True),
    "rotary, table": rotary(width=4, rotary_dim=8, positions=ints(0, 1, 2)),
    "rotary, float32": rotary(torch.float32, False, 16, weight_offset=1.0),
    "linear": linear(),
    "linear, float32": linear(torch.float32, False, 16),
}


def compared(call: tuple[Any, ...], backend: str = "triton") -> tuple[bool, str]:
    function, args, kwargs = call
    problem, _ = backends.problem_of(function, *args, **kwargs)
    about = proving.subject(backend, problem)
    assert about is not None
    return proving._compared(about, problem)


# Of each of these another one, or a bug below, has all but a little.
LONG = {
    "packed, used", "packed documents", "packed dropout", "float32 beside half", "row of a bias",
    "cache, rows", "cache, paged", "cache of float8", "cache, float32", "head, float32",
    "head, aligned", "rotary, table", "rotary, float32", "linear, float32", "ffn aligned",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CALLS]
)
def test_right_kernels_pass(name: str) -> None:
    passed, told = compared(CALLS[name])
    assert passed, told


@pytest.mark.parametrize("name", CALLS)
def test_no_result_is_vacuous(name: str) -> None:
    """Most elements of each result and gradient are of the size of the largest one.

    Also where tensors are made on another device unless it is named.
    """
    function, args, kwargs = CALLS[name]
    problem, _ = backends.problem_of(function, *args, **kwargs)
    proof = proving._proofs[problem.op]

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(shape, device="cpu").to(dtype)

    with torch.device("meta"):
        inputs = proving._cast(proof.inputs(problem, draw), torch.float64)
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


# --- bugs of the families -------------------------------------------------------------------------

Run = Callable[..., Any]


def of_extras(place: int, **changes: Callable[[Any], Any]) -> Callable[[Run], Run]:
    """A kernel that reads other values of some fields of its argument at `place`."""

    def wrong(run: Run) -> Run:
        def planted(*args: Any) -> Any:
            changed = {name: change(getattr(args[place], name)) for name, change in changes.items()}
            there = args[place]._replace(**changed)
            return run(*args[:place], there, *args[place + 1 :])

        return planted

    return wrong


def of_argument(place: int, change: Callable[[Any], Any]) -> Callable[[Run], Run]:
    """A kernel that reads something else in the place of an argument."""
    return lambda run: lambda *args: run(*args[:place], change(args[place]), *args[place + 1 :])


def of_result(place: int, change: Callable[[Any], Any]) -> Callable[[Run], Run]:
    def wrong(run: Run) -> Run:
        def planted(*args: Any) -> Any:
            results = list(run(*args))
            results[place] = change(results[place])
            return tuple(results)

        return planted

    return wrong


def another(seed: torch.Tensor) -> torch.Tensor:
    return seed + 1


def whole(blocks: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """All tiles of a block mask seen whole."""
    return *blocks[:2], torch.zeros_like(blocks[2]), *blocks[3:]


def nowhere(x: Any) -> None:
    return None


def of_few_tokens(run: Run) -> Run:
    """A tile of few tokens loses the last one."""

    def planted(x: torch.Tensor, *rest: Any) -> Any:
        out, *more = run(x, *rest)
        if len(x) <= 21:
            out[-1] = 0.0
        return out, *more

    return planted


def of_targets_only(run: Run) -> Run:
    """The gradients of all classes but the targets are lost."""

    def planted(*args: Any) -> Any:
        dlogits, targets = run(*args), args[2]
        index = targets.clamp(min=0)[:, None]
        return torch.zeros_like(dlogits).scatter(1, index, dlogits.gather(1, index))

    return planted


BUGS: dict[str, tuple[str, str, str, Callable[[Run], Run]]] = {
    "another mask of dropout": (
        "dropout", "attention.triton", "forward", of_extras(3, dropout_seed=another),
    ),
    "another mask in the backward": (
        "packed dropout", "attention.triton", "backward", of_extras(8, dropout_seed=another),
    ),
    "a norm's mask": ("norm dropout", "layer_norm.triton", "forward", of_argument(7, another)),
    "a norm's mask in the backward": (
        "norm dropout", "layer_norm.triton", "backward", of_argument(10, another),
    ),
    "partial tiles seen whole": (
        "block mask", "attention.triton", "forward", of_extras(3, blocks=whole),
    ),
    "a bias's row": ("row of a bias", "attention.triton", "backward", of_result(3, last_element)),
    "new keys not written": (
        "cache", "attention.cache.triton", "forward", of_extras(3, new_k=torch.zeros_like),
    ),
    "pages out of order": (
        "cache, paged", "attention.cache.triton", "forward",
        of_extras(3, block_table=lambda table: table.flip(1)),
    ),
    "left padding seen": (
        "cache, rows", "attention.cache.triton", "forward", of_extras(3, starts=nowhere),
    ),
    "pairs never interleaved": (
        "cache, rotary", "attention.cache.triton", "forward",
        of_extras(3, rotary_interleaved=lambda given: False),
    ),
    "scales of one sequence": (
        "cache of int8", "attention.cache.triton", "forward",
        of_extras(3, k_scale=lambda scale: scale if scale.dim() == 1 else scale[0]),
    ),
    "half of the scale": (
        "cache of float8", "attention.cache.triton", "forward",
        of_extras(3, v_scale=lambda scale: scale / 2),
    ),
    "classes without gradients": (
        "cross_entropy", "cross_entropy.triton", "kernel_backward", of_targets_only,
    ),
    "no cap": (
        "cross_entropy, all", "cross_entropy.triton", "kernel_forward",
        of_extras(3, softcap=lambda cap: 0.0),
    ),
    "a head's losses": (
        "head, losses", "linear_cross_entropy.triton", "kernel_forward", of_result(0, last_element),
    ),
    "a head's gradient": (
        "head, losses", "linear_cross_entropy.triton", "kernel_backward",
        of_result(1, off_by_a_percent),
    ),
    "a head's gradient with its mean": (
        "head", "linear_cross_entropy.triton", "kernel_forward",
        of_result(2, lambda made: (off_by_a_percent(made[0]), *made[1:])),
    ),
    "the rotation's sense": ("rotary", "rotary.triton", "backward", of_argument(5, torch.neg)),
    "a linear layer of few tokens": ("linear", "linear.triton", "forward", of_few_tokens),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_a_family_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, room, entry, wrong = BUGS[bug]
    kernels = importlib.import_module(f"fastattn.ops.{room}")
    monkeypatch.setattr(kernels, entry, wrong(getattr(kernels, entry)))
    passed, told = compared(CALLS[name])
    assert not passed, told
    assert "against float64" in told


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize(
    ("name", "room", "wrong"),
    [
        ("dropout", "attention.cuda", of_extras(3, dropout_seed=another)),
        ("cache of float8", "attention.cache.cuda", of_extras(3, lengths=lambda n: n - 1)),
    ],
)
def test_kernels_in_the_emulator(
    name: str, room: str, wrong: Callable[[Run], Run], bug: bool, emulator: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The CUDA C++ ones of attention with dropout, and of decoding on an 8-bit cache."""
    emulator.checks(0)
    kernels = importlib.import_module(f"fastattn.ops.{room}")
    if bug:
        monkeypatch.setattr(kernels, "forward", wrong(kernels.forward))
    passed, told = compared(CALLS[name], "cuda")
    assert passed is not bug, told


@pytest.mark.usefixtures("any_order")
def test_families_are_told_apart() -> None:
    """By all that selects a kernel, and by no length."""
    families = {}
    for name, (function, args, kwargs) in CALLS.items():
        problem, _ = backends.problem_of(function, *args, **kwargs)
        families[name] = problem.op, proving._proofs[problem.op].family(problem)
    assert len(set(families.values())) == len(CALLS)
    longer = backends.problem_of(fastattn.attention, *(x.repeat(2, 9, 1, 1) for x in qkv()))[0]
    assert attention_proof.family(longer) == families["attention"][1]


TRACED = ("norm dropout", "block mask", "cache of int8", "cross_entropy, all", "head", "rotary")


@pytest.mark.long  # test_proving.py has one
@pytest.mark.parametrize("name", TRACED)
def test_torch_compile_asks_for_a_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where sizes are symbols: it is told in what torch.compile can trace."""
    monkeypatch.setattr(backends, "FOR_TESTS", {})
    monkeypatch.setattr(measured, "devices", lambda device: ("a GPU", "sm_80"))
    monkeypatch.setattr(proving, "_known", {})
    monkeypatch.setattr(verdicts, "path_of", lambda about: None)
    function, args, kwargs = CALLS[name]

    def stop(graph: torch.fx.GraphModule, _: object) -> Any:
        assert "'triton'" in graph.code
        raise NotImplementedError("nothing is to run")

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="nothing is to run"):
        torch.compile(function, backend=stop, fullgraph=True, dynamic=True)(*args, **kwargs)
    asked = {about.family for about in proving._known}
    problem, _ = backends.problem_of(function, *args, **kwargs)
    assert asked == {proving._proofs[problem.op].family(problem)}


def test_autocast() -> None:
    """A kernel gets tensors that are cast already; a norm has its own result, in float32."""
    for name in ("ffn aligned", "linear", "head"):
        function, args, kwargs = CALLS[name]
        plain, _ = backends.problem_of(function, *args, **kwargs)
        with torch.autocast("cpu", HALF):
            cast, _ = backends.problem_of(function, *args, **kwargs)
        assert cast.autocast and not plain.autocast
        assert proving.subject("triton", cast) == proving.subject("triton", plain)


@pytest.mark.parametrize("bug", [False, True])
def test_a_norms_result_under_autocast(bug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not be rounded to 16 bits."""
    kernels = importlib.import_module("fastattn.ops.layer_norm.triton")
    if bug:
        rounded = of_result(0, lambda out: out.half().float())(kernels.forward)
        monkeypatch.setattr(kernels, "forward", rounded)
    problem, _ = backends.problem_of(fastattn.rms_norm, NORM[0].half(), NORM[1])
    problem = dataclasses.replace(problem, out_dtype=torch.float32)
    about = proving.subject("triton", problem)
    assert about is not None and "out float32" in about.family
    passed, told = proving._compared(about, problem)
    assert passed is not bug, told


def test_no_proof_is_said() -> None:
    empty = backends.problem_of(fastattn.attention, *(x[:, :0] for x in qkv()))[0]
    assert attention_proof.family(empty) is None
    plain = backends.problem_of(fastattn.linear, *linear()[1][:3])[0]
    assert linear_proof.family(plain) is None
