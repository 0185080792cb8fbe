"""flash-attn 2.8's functions as its documentation has them, against float64."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops import laws
from ops.attention import cases
from ops.attention.cache import test_cache as kv_cache

from fastattn import flash_attn
from fastattn.flash_attn import flash_attn_interface
from oracle import assert_close_to_reference

Tensors = tuple[torch.Tensor, ...]
OURS = {  # names of arguments
    "cache_seqlens": "cache_lengths",
    "cache_batch_idx": "cache_indices",
    "cache_leftpad": "cache_starts",
    "window_size": "window",
}
EMPTY = inspect.Parameter.empty

# --- the signatures -------------------------------------------------------------------------------

SHARED = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
VARLEN = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), EMPTY)
SIGNATURES: dict[str, dict[str, Any]] = {
    "flash_attn_func": {"q": EMPTY, "k": EMPTY, "v": EMPTY, **SHARED},
    "flash_attn_kvpacked_func": {"q": EMPTY, "kv": EMPTY, **SHARED},
    "flash_attn_qkvpacked_func": {"qkv": EMPTY, **SHARED},
    "flash_attn_varlen_func": {"q": EMPTY, "k": EMPTY, "v": EMPTY, **VARLEN, **SHARED, "block_table": None},
    "flash_attn_varlen_kvpacked_func": {"q": EMPTY, "kv": EMPTY, **VARLEN, **SHARED},
    "flash_attn_varlen_qkvpacked_func": {"qkv": EMPTY, "cu_seqlens": EMPTY, "max_seqlen": EMPTY, **SHARED},
    "flash_attn_with_kvcache": {
        "q": EMPTY,
        "k_cache": EMPTY,
        "v_cache": EMPTY,
        "k": None,
        "v": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert [(p.name, p.default) for p in parameters] == list(SIGNATURES[name].items())
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_the_names_are_where_flash_attn_has_them() -> None:
    assert sorted(flash_attn.__all__) == sorted(SIGNATURES)
    for name in SIGNATURES:
        assert getattr(flash_attn_interface, name) is getattr(flash_attn, name)


def test_the_version_is_that_of_the_interface() -> None:
    """`from flash_attn import __version__` decides in other libraries what they call."""
    from fastattn.flash_attn import __version__

    assert __version__ == "2.8.3"


# --- the definition, and what is held to it -------------------------------------------------------


def formula(
    *tensors: torch.Tensor,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    **options: Any,
) -> Tensors:
    """(out, lse) by the documented formula, in the inputs' dtype."""
    return cases.formula(*tensors, window=window_size, softcap=max(softcap, 0.0), **options)


CAPPED = {"max_factor": 3.0, "rms_factor": 2.0}  # the rule's factors where there is a softcap


def assert_as(
    ours: Callable[..., torch.Tensor],
    ours_lse: Callable[..., Tensors],
    plain: Callable[..., Tensors],
    tensors: list[torch.Tensor],
    *,
    capped: bool = False,
) -> None:
    """`ours(*tensors)` -> out with its gradients, and `ours_lse` -> (out, lse), against `plain`."""
    factors = CAPPED if capped else {}
    inputs, doubles = dict(zip("qkv", tensors)), [x.double() for x in tensors]
    dout = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    dout = dout.to(tensors[0])

    def found(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        return laws.results(lambda **x: function(*x.values()), inputs, dout)

    def out(*inputs: torch.Tensor) -> torch.Tensor:
        return plain(*inputs)[0]

    exact = found(out, laws.doubled(inputs))
    laws.held(found(ours, inputs), found(out, inputs), exact, "flash-attn's", **factors)
    with torch.no_grad():
        results = zip(("out", "lse"), ours_lse(*tensors), plain(*tensors), plain(*doubles))
        for name, actual, eager, exact in results:
            assert_close_to_reference(actual, eager, exact, name=name, **factors)


# --- dense ----------------------------------------------------------------------------------------

# Each case has its reason; `alibi` becomes slopes of that shape.
DENSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, more keys": {"seqlens": (9, 33), "causal": True},
    "causal, fewer keys": {"seqlens": (33, 9), "causal": True},  # 24 rows see no key
    "grouped heads": {"heads": (6, 2), "causal": True},
    "multi-query, one query": {"seqlens": (1, 21), "heads": (4, 1), "causal": True},
    "scale": {"softmax_scale": 0.2},
    "window": {"window_size": (5, 3)},
    "window, more keys": {"seqlens": (9, 33), "window_size": (4, 6)},
    "window, fewer keys": {"seqlens": (33, 9), "window_size": (4, 6)},  # blind rows at the top
    "window, left only": {"window_size": (3, -1)},
    "window, right only": {"seqlens": (20, 23), "window_size": (-1, 2)},
    "window, left only, fewer keys": {"seqlens": (40, 7), "window_size": (2, -1)},  # unbounded though the diagonal starts far below key 0
    "window, causal": {"window_size": (6, 4), "causal": True},  # causal caps the right side
    "softcap": {"softcap": 1.5},
    "softcap below 0 is none": {"softcap": -1.0},
    "alibi": {"alibi": (4,), "seqlens": (11, 19)},
    "alibi by sequence, causal": {"alibi": (2, 4), "causal": True},
    "odd head_dim": {"head_dim": 13, "causal": True},
    "everything": {"seqlens": (19, 30), "heads": (4, 2), "alibi": (2, 4), "softcap": 2.0, "window_size": (7, 2), "softmax_scale": 0.4},
}  # fmt: skip


def draw(
    device: str,
    *,
    seqlens: tuple[int, int] = (24, 24),
    heads: tuple[int, int] = (4, 4),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    alibi: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    shapes = [(2, n, h, head_dim) for n, h in zip((*seqlens, seqlens[1]), (*heads, heads[1]))]
    tensors = [torch.randn(*shape).to(dtype).to(device) for shape in shapes]
    if alibi is not None:
        options["alibi_slopes"] = torch.rand(*alibi).to(device)
    return tensors, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", DENSE)
def test_dense(case: str, dtype: torch.dtype, device: str) -> None:
    tensors, options = draw(device, dtype=dtype, **DENSE[case])
    assert_as(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **options),
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)[:2],
        lambda q, k, v: formula(q, k, v, **options),
        tensors,
        capped=options.get("softcap", 0.0) > 0,
    )


# 1 where a query (row) sees a key (column). The first two are flash-attn's own examples.
MASKS = {
    "causal 2 x 5": ({"causal": True}, "11110 11111"),
    "causal 5 x 2": ({"causal": True}, "00 00 00 10 11"),
    "window (1, 0)": ({"window_size": (1, 0)}, "1000 1100 0110 0011"),
    "window (1, 1)": ({"window_size": (1, 1)}, "1100 1110 0111 0011"),
    "window (0, -1)": ({"window_size": (0, -1)}, "1111 0111 0011 0001"),
    "window (-1, 1)": ({"window_size": (-1, 1)}, "1100 1110 1111 1111"),
    "any negative is unbounded": ({"window_size": (-7, 1)}, "1100 1110 1111 1111"),
    "window (1, 1) causal": ({"window_size": (1, 1), "causal": True}, "1000 1100 0110 0011"),
    "window (1, 0) 2 x 5": ({"window_size": (1, 0)}, "00110 00011"),
    "window (0, 1) 5 x 2": ({"window_size": (0, 1)}, "00 00 10 11 01"),
    "a list": ({"window_size": [1, 0]}, "1000 1100 0110 0011"),
    "a tensor": ({"window_size": torch.tensor([1, 0])}, "1000 1100 0110 0011"),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_as_drawn(name: str, device: str) -> None:
    """Equal scores and one-hot values: a row of the output is a row of the mask, over its sum."""
    options, figure = MASKS[name]
    mask = torch.tensor([[float(c) for c in row] for row in figure.split()])
    seqlen_q, seqlen_k = mask.shape
    q = torch.zeros(1, seqlen_q, 1, 8, device=device)
    k = torch.randn(1, seqlen_k, 1, 8, device=device)
    v = torch.eye(seqlen_k, 8, device=device)[None, :, None]
    out = flash_attn.flash_attn_func(q, k, v, **options)[0, :, 0, :seqlen_k].cpu()
    torch.testing.assert_close(out, mask / mask.sum(-1, keepdim=True).clamp(min=1.0))


@pytest.mark.parametrize("window_size", [None, 3, (1,), (1, 2, 3), (1.5, 0)])
def test_window_that_is_none(window_size: Any) -> None:
    q = torch.randn(1, 3, 1, 8)
    with pytest.raises(ValueError, match="window_size must be two integers"):
        flash_attn.flash_attn_func(q, q, q, window_size=window_size)


# --- all six functions: one problem, each in the layout of the function ----------------------------

SIX = [name for name in SIGNATURES if name != "flash_attn_with_kvcache"]


def through(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    integer: Callable[[int], Any] = int,
    **options: Any,
) -> torch.Tensor | Tensors:
    """The result of the function of that name, with out and LSE as flash_attn_func has them.

    `integer` makes what max_seqlen is given as.
    """
    varlen = "varlen" in name
    batch, seqlen_q, heads, head_dim = q.shape
    lengths = []
    if varlen:
        cu_q, cu_k = (
            torch.arange(batch + 1, dtype=torch.int32, device=q.device) * x.shape[1] for x in (q, k)
        )
        longest = integer(seqlen_q), integer(k.shape[1])
        lengths = [cu_q, longest[0]] if "qkv" in name else [cu_q, cu_k, *longest]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if "qkvpacked" in name:
        tensors = [torch.stack([q, k, v], -3)]
    elif "kvpacked" in name:
        tensors = [q, torch.stack([k, v], -3)]
    else:
        tensors = [q, k, v]
    result = getattr(flash_attn, name)(*tensors, *lengths, **options)
    if not varlen:
        return result
    shape = (batch, seqlen_q, heads, head_dim)
    if isinstance(result, torch.Tensor):
        return result.view(shape)
    out, lse, probabilities = result
    return out.view(shape), lse.view(heads, batch, seqlen_q).transpose(0, 1), probabilities


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window_size": (9, 3), "softmax_scale": 0.2},
        {"softcap": 2.0, "alibi": (2, 4)},
    ],
    ids=["causal, window, scale", "softcap, alibi"],
)
def test_every_function_passes_every_option(
    name: str, options: dict[str, Any], device: str
) -> None:
    tensors, options = draw(device, **options)
    assert_as(
        lambda *x: through(name, *x, **options),
        lambda *x: through(name, *x, **options, return_attn_probs=True)[:2],
        lambda *x: formula(*x, **options),
        tensors,
        capped="softcap" in options,
    )


@pytest.mark.parametrize("name", SIX)
def test_arguments_by_position(name: str, device: str) -> None:
    """Callers pass all of them in a row."""
    (q, k, v), options = draw(device, alibi=(4,), softcap=2.0)
    by_position = (0.0, 0.4, True, (9, 0), 2.0, options["alibi_slopes"], True, True)
    expected = dict(zip(SHARED, by_position))
    positional = through(name, q, k, v, **expected)
    function = getattr(flash_attn, name)

    def shuffled(*args: Any, **kwargs: Any) -> Any:
        return function(*args, *kwargs.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attn, name, shuffled)
        for ours, theirs in zip(through(name, q, k, v, **expected)[:2], positional[:2]):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SIX)
def test_return_values(name: str, device: str) -> None:
    tensors, _ = draw(device, dtype=torch.float16)
    out = through(name, *tensors)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float16
    result = through(name, *tensors, return_attn_probs=True)
    assert isinstance(result, tuple) and len(result) == 3
    assert result[1].shape == (2, 4, 24) and result[1].dtype == torch.float32
    assert result[2] is None  # S_dmask is never formed


@pytest.mark.parametrize("name", SIX)
def test_deterministic_is_passed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only kernels for Hopper know the difference."""
    given = []

    def noted(run: Callable[..., Any], *args: Any, **features: Any) -> Any:
        given.append(features["deterministic"])
        return run(*args, **features)

    for op in ("attention", "attention_varlen"):
        run = getattr(flash_attn_interface, op)
        monkeypatch.setattr(flash_attn_interface, op, functools.partial(noted, run))
    tensors, _ = draw("cpu", dtype=torch.float16)
    outs = [through(name, *tensors, **x) for x in ({}, {"deterministic": True})]
    assert given == [False, True] and torch.equal(*outs)


@pytest.mark.parametrize("name", SIX)
def test_dropout(name: str, device: str) -> None:
    """Equal weights and values of 1: an output is the share that was kept over 1 - p."""
    p = 0.75
    q, k = torch.zeros(2, 2, 128, 4, 8, device=device)
    v = torch.ones_like(k, requires_grad=True)

    def dropped(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return through(name, q, k, v, dropout_p=p)

    out = dropped(0)
    assert torch.equal(out, dropped(0)) and not torch.equal(out, dropped(1))
    rows = out[..., 0].detach().double()
    deviation = math.sqrt(p / (1 - p) / 128)  # of a binomial share, scaled
    assert abs(rows.mean().item() - 1.0) < 5 * deviation / math.sqrt(rows.numel())
    assert 0.85 * deviation < rows.std().item() < 1.15 * deviation
    (dv,) = torch.autograd.grad(out.sum(), v)  # the same weights, summed the other way
    torch.testing.assert_close(dv.sum(), out.sum(), rtol=1e-4, atol=0.0)


# kind -> (an integer, a number, a flag) as callers have them
KINDS: dict[str, tuple[Callable[[int], Any], Callable[[float], Any], Callable[[bool], Any]]] = {
    "Python": (int, float, int),
    "numpy": (np.int64, np.float32, np.bool_),
    "numpy arrays": (np.array, np.array, np.array),
    "tensors": (torch.tensor, torch.tensor, torch.tensor),
    "int32 tensors": (lambda n: torch.tensor([n, 0], dtype=torch.int32).max(), torch.tensor, int),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIX)
def test_numbers_of_every_kind(name: str, kind: str, device: str) -> None:
    tensors, _ = draw(device, seqlens=(8, 8))
    integer, number, flag = KINDS[kind]

    def run(integer: Any, number: Any, flag: Any) -> Any:
        torch.manual_seed(0)
        options = {
            "dropout_p": number(0.25),
            "softmax_scale": number(0.5),
            "causal": flag(True),
            "window_size": (integer(5), integer(-1)),
            "softcap": number(2.0),
            "return_attn_probs": flag(True),
        }
        return through(name, *tensors, integer=integer, **options)

    ours, expected = run(integer, number, flag), run(int, float, bool)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    for causal in (None, 0, flag(False)):
        out = through(name, *tensors, causal=causal, softcap=number(-1.0))
        assert torch.equal(out, through(name, *tensors))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"causal": "top_left"}, "causal must be True or False; got 'top_left'"),
        ({"causal": torch.ones(2)}, "causal must be True or False; got tensor"),
        ({"softmax_scale": "1"}, "softmax_scale must be a number; got '1'"),
        ({"softcap": torch.ones(2)}, "softcap must be a number; got tensor"),
        ({"dropout_p": [0.5]}, r"dropout_p must be a number; got \[0.5\]"),
        ({"max_seqlen_q": 5.0}, "max_seqlen_q must be an integer; got 5.0"),
        ({"max_seqlen_k": torch.tensor(5.0)}, "max_seqlen_k must be an integer; got tensor"),
        ({"max_seqlen_k": torch.tensor([5, 5])}, "max_seqlen_k must be an integer; got tensor"),
    ],
)
def test_numbers_that_are_none(change: dict[str, Any], message: str) -> None:
    x, cu = torch.randn(5, 2, 8), torch.tensor([0, 5])
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    with pytest.raises(TypeError, match=message):
        flash_attn.flash_attn_varlen_func(x, x, x, **(lengths | change))


def test_packed_as_transformers_calls(device: str) -> None:
    """Its lengths of samples packed in a row, found from their positions, are tensors."""
    utils = pytest.importorskip("transformers.modeling_flash_attention_utils")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device)
    (cu_q, cu_k), (max_q, max_k) = utils.prepare_fa_kwargs_from_position_ids(positions)
    x = torch.randn(7, 4, 16, device=device)
    out = flash_attn.flash_attn_varlen_func(
        x, x, x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k
    )
    alone = [flash_attn.flash_attn_func(*(part[None],) * 3)[0] for part in x.split([3, 4])]
    torch.testing.assert_close(out, torch.cat(alone))


@pytest.mark.parametrize(
    "name, shape, layout",
    [
        ("flash_attn_qkvpacked_func", (2, 5, 2, 4, 8), r"qkv must be \(batch, seqlen, 3, heads, head_dim\)"),
        ("flash_attn_qkvpacked_func", (5, 3, 4, 8), r"got \(5, 3, 4, 8\)"),
        ("flash_attn_kvpacked_func", (2, 5, 3, 4, 8), r"kv must be \(batch, seqlen, 2, kv_heads, head_dim\)"),
        ("flash_attn_varlen_qkvpacked_func", (5, 2, 4, 8), r"qkv must be \(total, 3, heads, head_dim\)"),
        ("flash_attn_varlen_kvpacked_func", (2, 5, 2, 4, 8), r"kv must be \(total, 2, kv_heads, head_dim\)"),
    ],
)  # fmt: skip
def test_packed_wrongly(name: str, shape: tuple[int, ...], layout: str) -> None:
    packed, q, cu = torch.randn(shape), torch.randn(2, 5, 4, 8), torch.tensor([0, 5])
    arguments = [packed] if "qkv" in name else [q, packed]
    if "varlen" in name:
        arguments += [cu, 5] if "qkv" in name else [cu, cu, 5, 5]
    with pytest.raises(ValueError, match=layout):
        getattr(flash_attn, name)(*arguments)


def test_compiles_without_a_graph_break(device: str) -> None:
    (q, k, v), _ = draw(device)
    compiled = torch.compile(flash_attn.flash_attn_func, backend="eager", fullgraph=True)
    options: dict[str, Any] = {"causal": True, "window_size": (5, 0)}
    exact = formula(q.double(), k.double(), v.double(), **options)[0]
    eager = formula(q, k, v, **options)[0]
    assert_close_to_reference(compiled(q, k, v, **options), eager, exact)


def test_varlen_compiles_for_all_lengths(device: str) -> None:
    """Symbolic lengths stay so: one graph, whatever the sequences are."""
    torch._dynamo.reset()
    compilations = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(
        flash_attn.flash_attn_varlen_func, backend=compilations, fullgraph=True, dynamic=True
    )
    counts = []
    for lengths in ((3, 4), (5, 7), (9, 2)):
        cu = cumulative(lengths, device)
        x = torch.randn(sum(lengths), 2, 8, device=device)
        arguments = x, x, x, cu, cu, max(lengths), max(lengths)
        expected = flash_attn.flash_attn_varlen_func(*arguments)
        torch.testing.assert_close(compiled(*arguments), expected)
        counts.append(compilations.frame_count)
    assert len(set(counts)) == 1


# --- varlen ---------------------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K = (5, 0, 12, 4), (9, 3, 12, 0)  # queries without keys, keys without queries
BEYOND = 3  # tokens behind the last sequence

PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "grouped heads": {"causal": True, "heads": (6, 2)},
    "window": {"window_size": (3, 1)},
    "alibi by sequence": {"alibi": (4, 4)},
    "everything": {"softcap": 2.0, "alibi": (4,), "softmax_scale": 0.4, "causal": True, "window_size": (4, 0), "heads": (4, 2)},
}  # fmt: skip


def cumulative(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.tensor(
        [sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int32, device=device
    )


def packed(*tensors: torch.Tensor, **options: Any) -> Tensors:
    """`formula` on the sequences of these lengths."""
    starts = (cumulative(lengths, "cpu") for lengths in (LENGTHS_Q, LENGTHS_K))
    packing = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts))
    problem = cases.Problem({}, {OURS.get(n, n): x for n, x in options.items()}, packing)
    return cases.formula_of(problem, None, dict(zip("qkv", tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PACKED)
def test_varlen(case: str, dtype: torch.dtype, device: str) -> None:
    seqlens = sum(LENGTHS_Q) + BEYOND, sum(LENGTHS_K) + BEYOND
    tensors, options = draw(device, seqlens=seqlens, dtype=dtype, **PACKED[case])
    tensors = [x[0] for x in tensors]
    lengths = (
        cumulative(LENGTHS_Q, device),
        cumulative(LENGTHS_K, device),
        max(LENGTHS_Q),
        max(LENGTHS_K),
    )

    assert_as(
        lambda *x: flash_attn.flash_attn_varlen_func(*x, *lengths, **options),
        lambda *x: flash_attn.flash_attn_varlen_func(
            *x, *lengths, **options, return_attn_probs=True
        )[:2],
        lambda *x: packed(*x, **options),
        tensors,
        capped="softcap" in options,
    )


PAGE_SIZE, PAGES = 4, 9
# Pages out of order, one shared by two sequences; what follows a sequence's last is not a page.
TABLE = [[7, 2, 5, -1], [1, 99, 99, 99], [0, 2, 8, 99], [-1, -1, -1, -1]]


@pytest.mark.parametrize("case", PACKED)
def test_varlen_with_pages(case: str, device: str) -> None:
    tensors, options = draw(device, seqlens=(sum(LENGTHS_Q), PAGES * PAGE_SIZE), **PACKED[case])
    q, *kv = (x[0] for x in tensors)
    tensors = [q, *(x.unflatten(0, (PAGES, PAGE_SIZE)) for x in kv)]
    lengths = (
        cumulative(LENGTHS_Q, device),
        cumulative(LENGTHS_K, device),
        max(LENGTHS_Q),
        max(LENGTHS_K),
    )
    table = torch.tensor(TABLE, dtype=torch.int32, device=device)
    pages = [row[: -(-n // PAGE_SIZE)] for row, n in zip(TABLE, LENGTHS_K)]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        k, v = (
            torch.cat([x[row].flatten(0, 1)[:n] for row, n in zip(pages, LENGTHS_K)])
            for x in (k, v)
        )
        return packed(q, k, v, **options)

    ours, ours_options = flash_attn.flash_attn_varlen_func, options | {"block_table": table}
    assert_as(
        lambda *x: ours(*x, *lengths, **ours_options),
        lambda *x: ours(*x, *lengths, **ours_options, return_attn_probs=True)[:2],
        plain,
        tensors,
        capped="softcap" in options,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (20, 4, 8)}, r"k and v must be \(pages, page_size, kv_heads, head_dim\)"),
        ({"v": (4, 4, 4, 8)}, r"got \(5, 4, 4, 8\) and \(4, 4, 4, 8\)"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, r"block_table must have the shape .* = \(2, ...\)"),
        ({"block_table": torch.zeros(2, 2)}, "block_table must be int32 or int64; got torch.float32"),
        ({"block_table": [[0, 1], [2, 3]]}, "block_table must be a torch.Tensor; got list"),
        ({"block_table": torch.tensor([[0, 1], [5, 3]])}, "block_table must name pages of k, 0 to 4; got 5"),
        ({"block_table": torch.tensor([[0, -1], [2, 3]])}, "0 to 4; got -1"),
        ({"block_table": torch.tensor([[0], [2]])}, "leave 1 pages of 4 keys to a sequence; cu_seqlens_k has one of 6"),
        ({"cu_seqlens_k": torch.tensor([0.0, 6.0, 10.0])}, "cu_seqlens_k must be int32 or int64; got torch.float32"),
    ],
)  # fmt: skip
def test_wrong_pages(change: dict[str, Any], message: str) -> None:
    cu_seqlens = torch.tensor([0, 6, 10])
    arguments: dict[str, Any] = {
        "q": (10, 4, 8),
        "k": (5, 4, 4, 8),
        "v": (5, 4, 4, 8),
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": 6,
        "max_seqlen_k": 6,
        "block_table": torch.tensor([[0, 1], [2, 3]]),
    }
    arguments |= change
    for name in "qkv":
        arguments[name] = torch.randn(arguments[name])
    with pytest.raises((TypeError, ValueError), match=message):
        flash_attn.flash_attn_varlen_func(**arguments)


@pytest.mark.parametrize("pages", (5, 0))
def test_unchecked_pages_are_cut_to_those_that_there_are(
    pages: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """As on a GPU, where a gather from outside would end the process."""
    from fastattn.flash_attn import pages as module
    from fastattn.ops.attention import problem

    for x in (module, problem):
        monkeypatch.setattr(x, "values_are_checked", lambda tensor: False)
    cu = torch.tensor([0, 6, 10], device=device)
    q = torch.randn(10, 4, 8, device=device)
    k, v = torch.randn(2, pages, 4, 4, 8, device=device)
    outs = []
    for table in ([[99, -7], [2**31 - 1, 0]], [[4, 0], [4, 0]]):
        table = torch.tensor(table, dtype=torch.int32, device=device)
        outs.append(flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, block_table=table))
    assert torch.equal(*outs) and outs[0].isfinite().all()
    assert pages or (outs[0] == 0).all()


def test_varlen_without_a_page(device: str) -> None:
    cu, table = torch.tensor([0, 0, 0], device=device), torch.zeros(2, 3, device=device).int()
    k = torch.randn(0, 4, 4, 8, device=device)
    q, cu_q = torch.randn(10, 4, 8, device=device), torch.tensor([0, 6, 10], device=device)
    out = flash_attn.flash_attn_varlen_func(q, k, k, cu_q, cu, 6, 6, block_table=table)
    assert (out == 0).all()


# --- a cache --------------------------------------------------------------------------------------

CAPACITY, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 16
FILLED = (7, 0, 17)  # keys in the cache of each sequence before the call; the rest is NaN
NAN = float("nan")


class Cache:
    """A cache laid out as a case asks for it, and the arguments of the call."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        *,
        seqlen_q: int = 1,
        new: int = 0,
        filled: tuple[int, ...] = FILLED,
        said: str = "tensor",  # how cache_seqlens says so: a tensor, an int, or nothing
        rows: tuple[int, ...] | None = None,
        starts: tuple[int, ...] | None = None,
        page: int | None = None,
        rotary: int = 0,
        alibi: tuple[int, ...] | None = None,
        **options: Any,
    ) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(dtype).to(device)

        def integers(x: tuple[int, ...]) -> torch.Tensor:
            return torch.tensor(x, dtype=torch.int32, device=device)

        batch, passed = len(filled), options
        shape = batch, CAPACITY
        if page:
            shape = batch * CAPACITY // page + 2, page  # two pages are no one's
            pages = torch.randperm(shape[0])[:-2].view(batch, -1)
            passed["block_table"] = pages.to(torch.int32).to(device)
        if rows is not None:
            shape = max(rows) + 2, CAPACITY
            passed["cache_batch_idx"] = integers(rows)
        if said == "tensor":
            passed["cache_seqlens"] = integers(filled)
        elif said == "int":
            (passed["cache_seqlens"],) = set(filled)
        if starts:
            passed["cache_leftpad"] = integers(starts)
        self.q = normal(batch, seqlen_q, HEADS, HEAD_DIM)
        self.k, self.v = normal(2, batch, new, KV_HEADS, HEAD_DIM)
        if new:
            passed |= {"k": self.k, "v": self.v}
        if rotary:
            angles = 3.0 * torch.rand(CAPACITY, rotary // 2).to(device)
            passed["rotary_cos"] = angles.cos().to(dtype)
            passed["rotary_sin"] = angles.sin().to(dtype)
        if alibi is not None:
            passed["alibi_slopes"] = torch.rand(alibi).to(device)
        self.passed = passed
        k_cache, v_cache = normal(2, *shape, KV_HEADS, HEAD_DIM)
        self.call = {
            "q": self.q, "k_cache": k_cache, "v_cache": v_cache, "causal": False,
            "rotary_interleaved": True, **{OURS.get(n, n): x for n, x in passed.items()},
            "cache_lengths": integers(filled),
        }  # fmt: skip
        poisoned = kv_cache.poisoned(self.call)
        self.k_cache, self.v_cache = poisoned["k_cache"], poisoned["v_cache"]

    def run(self, **more: Any) -> Any:
        return flash_attn.flash_attn_with_kvcache(
            self.q, self.k_cache, self.v_cache, **self.passed, **more
        )

    def plain(self, dtype: torch.dtype) -> Tensors:
        """(out, lse), a sequence at a time, on the keys that count and no others."""
        return kv_cache.formula(self.call, dtype)


# Each case has its reason.
CACHED: dict[str, dict[str, Any]] = {
    "decode": {},  # one sequence has no key at all
    "decode, causal": {"causal": True},
    "several queries": {"seqlen_q": 4},
    "several queries, causal": {"seqlen_q": 4, "causal": True},
    "int": {"filled": (11, 11, 11), "said": "int"},
    "int 0": {"filled": (0, 0, 0), "said": "int", "new": 3, "seqlen_q": 3, "causal": True},
    "whole capacity": {"filled": (CAPACITY,) * 3, "said": "nothing", "seqlen_q": 2, "causal": True},
    "whole capacity, paged": {"filled": (CAPACITY,) * 3, "said": "nothing", "page": 8},
    "append": {"new": 1, "causal": True},
    "append, several": {"seqlen_q": 5, "new": 5, "causal": True},
    "append fewer than queries": {"seqlen_q": 5, "new": 2, "causal": True},
    "append, not causal": {"seqlen_q": 3, "new": 3},
    "append to the end": {"new": 3, "filled": (21, 20, 21), "causal": True, "seqlen_q": 3},
    "rotary": {"seqlen_q": 4, "new": 4, "rotary": 16, "causal": True},  # interleaved by default
    "rotary, halves": {"seqlen_q": 4, "new": 4, "rotary": 16, "causal": True, "rotary_interleaved": False},
    "rotary, part of a head": {"seqlen_q": 2, "new": 2, "rotary": 8, "causal": True},
    "rotary, halves of a part": {"new": 1, "rotary": 8, "rotary_interleaved": False, "causal": True},
    "rotary, not causal": {"seqlen_q": 4, "new": 4, "rotary": 16},  # all queries at one position
    "rotary, window": {"seqlen_q": 4, "new": 4, "rotary": 16, "window_size": (5, 1)},
    "rows": {"rows": (4, 0, 2), "causal": True, "seqlen_q": 2},
    "rows, append": {"rows": (4, 0, 2), "new": 2, "seqlen_q": 2, "causal": True, "rotary": 8},
    "left padding": {"starts": (3, 0, 16), "seqlen_q": 2, "causal": True},
    "left padding, append": {"starts": (3, 0, 9), "new": 2, "seqlen_q": 2, "causal": True, "rotary": 16, "alibi": (4,)},
    "pages": {"page": 4, "causal": True},
    "pages, append over an edge": {"page": 4, "new": 6, "seqlen_q": 6, "causal": True, "rotary": 16},
    "pages of one key": {"page": 1, "new": 2, "seqlen_q": 2},
    "window": {"window_size": (4, 0), "seqlen_q": 3},
    "window, both sides": {"window_size": (2, 1), "seqlen_q": 5, "new": 5},
    "softcap": {"softcap": 1.5, "causal": True, "seqlen_q": 2},
    "alibi": {"alibi": (4,), "causal": True, "seqlen_q": 3},
    "alibi by sequence": {"alibi": (3, 4), "seqlen_q": 3},
    "scale": {"softmax_scale": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CACHED)
def test_kvcache(case: str, dtype: torch.dtype, device: str) -> None:
    cache = Cache(device, dtype, **CACHED[case])
    factors = CAPPED if "softcap" in CACHED[case] else {}
    out, lse = cache.run(return_softmax_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    results = zip(("out", "lse"), (out, lse), cache.plain(dtype), cache.plain(torch.float64))
    for name, actual, eager, exact in results:
        assert_close_to_reference(actual, eager, exact, name=name, **factors)
    kv_cache.check_appended(cache.call, {"k_cache": cache.k_cache, "v_cache": cache.v_cache})


def test_kvcache_returns_out_alone(device: str) -> None:
    cache = Cache(device, torch.float32, causal=True, seqlen_q=2)
    out = cache.run()
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, cache.run(return_softmax_lse=True)[0])


@pytest.mark.parametrize("num_splits", [0, 1, 3, 64])
def test_kvcache_splits(num_splits: int, device: str) -> None:
    cache = Cache(device, torch.float32, seqlen_q=2, causal=True, page=4)
    result = cache.run(num_splits=num_splits, return_softmax_lse=True)
    for actual, eager, exact in zip(result, cache.plain(torch.float32), cache.plain(torch.float64)):
        assert_close_to_reference(actual, eager, exact)


def test_kvcache_steps_are_one_causal_call(device: str) -> None:
    """A prompt, then a token at a time, is attention over the whole."""
    (q, k, v), _ = draw(device, seqlens=(10, 10), heads=(4, 2))
    k_cache, v_cache = torch.full((2, *k.shape), NAN, device=device)
    outs, done = [], 0
    for step in (6, 1, 1, 2):
        part = slice(done, done + step)
        out = flash_attn.flash_attn_with_kvcache(
            q[:, part], k_cache, v_cache, k[:, part], v[:, part], cache_seqlens=done, causal=True
        )
        outs.append(out)
        done += step
    exact = formula(q.double(), k.double(), v.double(), causal=True)[0]
    assert_close_to_reference(torch.cat(outs, 1), formula(q, k, v, causal=True)[0], exact)
    assert torch.equal(k_cache, k) and torch.equal(v_cache, v)


def test_kvcache_runs_where_a_gradient_is_wanted(device: str) -> None:
    """flash-attn has no backward here, and does not refuse tensors that require grad."""
    cache = Cache(device, torch.float32, new=1, causal=True)
    expected = cache.plain(torch.float64)[0]
    for x in (cache.q, cache.k, cache.v, cache.k_cache, cache.v_cache):
        x.requires_grad_()
    out = cache.run()
    assert torch.is_grad_enabled() and not out.requires_grad and out.grad_fn is None
    with torch.no_grad():
        assert_close_to_reference(out, cache.plain(torch.float32)[0], expected)


@pytest.mark.parametrize("new", (0, 2))
def test_kvcache_of_more_rows_than_sequences(new: int, device: str) -> None:
    """Without cache_batch_idx the first rows count; the others stay as they are."""
    cache = Cache(device, torch.float32, seqlen_q=2, new=new, causal=True)
    more = torch.full((2, *cache.k_cache.shape[1:]), NAN, device=device)
    alone = cache.k_cache.clone(), cache.v_cache.clone()
    expected = flash_attn.flash_attn_with_kvcache(cache.q, *alone, **cache.passed)
    cache.k_cache, cache.v_cache = (torch.cat([x, more]) for x in (cache.k_cache, cache.v_cache))
    assert torch.equal(cache.run(), expected)
    same = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    for ours, its in zip((cache.k_cache, cache.v_cache), alone):
        torch.testing.assert_close(ours, torch.cat([its, more]), **same)
    cache.k_cache, cache.v_cache = cache.k_cache[:1], cache.v_cache[:1]
    with pytest.raises(ValueError, match="k_cache must have q's batch size 3"):
        cache.run()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_kvcache_under_autocast(dtype: torch.dtype, device: str) -> None:
    """flash-attn takes no part in it: tensors of one dtype give what they give outside."""
    cache = Cache(device, dtype, seqlen_q=2, new=2, causal=True)
    expected = cache.run(return_softmax_lse=True)
    with torch.autocast(device, torch.bfloat16):
        out, lse = cache.run(return_softmax_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_kvcache_numbers_of_every_kind(kind: str, device: str) -> None:
    integer, number, flag = KINDS[kind]
    cache = Cache(device, torch.float32, filled=(11, 11, 11), said="int", seqlen_q=2)
    expected = cache.run(causal=True, softmax_scale=0.5, softcap=2.0, num_splits=2)
    cache.passed["cache_seqlens"] = integer(11)
    out = cache.run(
        causal=flag(True), softmax_scale=number(0.5), softcap=number(2.0), num_splits=integer(2)
    )
    assert torch.equal(out, expected)


def test_kvcache_new_keys_need_their_place() -> None:
    cache = Cache("cpu", torch.float32, new=1, said="nothing")
    with pytest.raises(ValueError, match=r"give cache_seqlens, an int or \(batch,\), with k"):
        cache.run()


@pytest.mark.parametrize("said", ("tensor", "int"))
@pytest.mark.parametrize("new", (0, 2))
def test_kvcache_beyond_its_pages(new: int, said: str) -> None:
    """What flash-attn raises; a cache that the pages just hold is none."""
    cache = Cache("cpu", torch.float32, new=new, said=said, filled=(CAPACITY - new,) * 3, page=8)
    cache.run()
    cache.passed["cache_seqlens"] = cache.passed["cache_seqlens"] + 1
    before = cache.k_cache.clone()
    with pytest.raises(RuntimeError, match=f"^block_table has .* need {CAPACITY + 1}: "):
        cache.run()
    torch.testing.assert_close(cache.k_cache, before, rtol=0, atol=0, equal_nan=True)
