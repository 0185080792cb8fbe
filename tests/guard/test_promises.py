"""Two promises of every public op: no build for a shape, and no call that waits for the device."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from guard import specialisations, steps

import fastattn
from fastattn.ops.attention import problem as attention_problem
from fastattn.ops.attention.cache import interface as cache_interface
from fastattn.ops.attention.cache import problem as cache_problem
from fastattn.ops.attention.cache import reference as cache_reference
from fastattn.ops.cross_entropy import aten as loss_aten
from fastattn.ops.cross_entropy import registration as loss_registration
from fastattn.ops.linear import linear, product
from fastattn.ops.linear_cross_entropy import aten as head_aten
from fastattn.ops.rotary import problem as rotary_problem

SHAPES = 200
# Kernels that all lengths and batches of one op take together: those of forward and backward, of
# few rows and of many.
MOST_KERNELS = 10

# Operators of ATen for which the host waits: their results, or the sizes of these, are values.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
    "unique_consecutive", "repeat_interleave.Tensor", "bincount", "allclose",
}  # fmt: skip
# Methods of a tensor that reach the host without an operator, where the tensor lies on it.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def test_no_build_per_shape() -> None:
    """The second hundred of random shapes compiles nothing, and the first very little."""
    for op, numbers in specialisations.report("random").items():
        assert numbers["all shapes"] == numbers["half of the shapes"] <= MOST_KERNELS, op


class _Waits(steps.Operators):
    """Notes those for which the host waits."""

    def note(self, operator: Any, args: Any) -> None:
        name = operator._schema.name.removeprefix("aten::")
        overload = f"{name}.{operator._schema.overload_name}"
        indexed = name.startswith(("index", "_index")) and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITS or overload in WAITS or indexed:
            self.names.append(overload)


@contextlib.contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with monkeypatch.context() as patch, _Waits() as mode:

        def noted(name: str) -> Callable[..., Any]:
            original = getattr(torch.Tensor, name)

            def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                mode.names.append(f"Tensor.{name}")
                return original(self, *args, **kwargs)

            return read

        for name in READS:
            patch.setattr(torch.Tensor, name, noted(name))
        yield mode.names


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents of index tensors are looked at where that is free: on a CPU."""
    for module in (attention_problem, cache_interface, cache_problem, cache_reference):
        monkeypatch.setattr(module, "values_are_checked", lambda tensor: False)
    for module in (loss_aten, loss_registration, head_aten):
        monkeypatch.setattr(module, "check_classes", lambda *_: None)
    monkeypatch.setattr(rotary_problem, "check_values", lambda *_: None)


# --- a call of each op, of random shape and features ----------------------------------------------


def _tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def _features(draw: random.Random, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    batch, heads, seqlen_q, seqlen_k = shape
    return draw.choice(
        [
            {},
            {"causal": True},
            {"causal": True, "window": (draw.randrange(9), 0)},
            {"bias": _tensor(1, heads, seqlen_q, seqlen_k)},
            {"mask": torch.ones(batch, 1, seqlen_q, seqlen_k, dtype=torch.bool)},
            {"alibi_slopes": torch.ones(heads)},
            {"dropout_p": 0.1},
        ]
    )


def _attention(draw: random.Random) -> Any:
    batch, kv_heads, group = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 3)
    seqlen_q, seqlen_k = draw.randint(1, 70), draw.randint(1, 70)
    head_dim = draw.choice((8, 16, 40, 64))
    q = _tensor(batch, seqlen_q, kv_heads * group, head_dim)
    k, v = (_tensor(batch, seqlen_k, kv_heads, head_dim) for _ in "kv")
    features = _features(draw, (batch, kv_heads * group, seqlen_q, seqlen_k))
    if draw.random() < 0.2:
        features = {
            "document_ids": (
                torch.zeros(batch, seqlen_q, dtype=torch.int32),
                torch.zeros(batch, seqlen_k, dtype=torch.int32),
            )
        }
    return fastattn.attention(q, k, v, **features)


def _padded(draw: random.Random) -> Any:
    batch, seqlen = draw.randint(1, 4), draw.randint(1, 70)
    q, k, v = (_tensor(batch, seqlen, 2, 16) for _ in "qkv")
    lengths = torch.full((batch,), draw.randint(0, seqlen), dtype=torch.int32)
    features = {"softcap": draw.choice((0.0, 5.0)), "sink": draw.choice((None, _tensor(2)))}
    return fastattn.attention(q, k, v, key_lengths=lengths, **features)


def _varlen(draw: random.Random) -> Any:
    lengths = [draw.randint(0, 40) for _ in range(draw.randint(1, 5))]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    heads, head_dim = draw.randint(1, 4), draw.choice((8, 16, 64))
    q, k, v = (_tensor(sum(lengths), heads, head_dim) for _ in "qkv")
    longest = max(lengths)
    features = _features(draw, (len(lengths), heads, longest, longest))
    return fastattn.attention_varlen(q, k, v, starts, starts, longest, longest, **features)


def _cache(draw: random.Random) -> Any:
    batch, kv_heads, group = draw.randint(1, 4), draw.randint(1, 2), draw.randint(1, 3)
    new, head_dim, capacity = draw.randint(1, 3), draw.choice((8, 16, 64)), 64
    q = torch.randn(batch, new, kv_heads * group, head_dim)
    k, v = (torch.randn(batch, new, kv_heads, head_dim) for _ in "kv")
    lengths = torch.full((batch,), draw.randint(0, 60), dtype=torch.int32)
    rest: dict[str, Any] = {}
    if draw.random() < 0.5:
        keys, values = (torch.zeros(batch, capacity, kv_heads, head_dim) for _ in "kv")
    else:
        keys, values = (torch.zeros(4 * batch, 16, kv_heads, head_dim) for _ in "kv")
        rest["block_table"] = torch.arange(4 * batch, dtype=torch.int32).view(batch, 4)
    if draw.random() < 0.5:
        rest["rotary_cos"], rest["rotary_sin"] = (torch.ones(64, head_dim // 2) for _ in "cs")
    return fastattn.attention_with_kv_cache(q, keys, values, lengths, k=k, v=v, **rest)


def _rows(draw: random.Random) -> tuple[torch.Tensor, int]:
    shape = [draw.randint(1, 6) for _ in range(draw.randint(0, 3))]
    width = draw.randint(1, 90)
    return _tensor(*shape, width), width


def _layer_norm(draw: random.Random) -> Any:
    x, width = _rows(draw)
    residual = draw.choice((None, torch.randn_like(x)))
    return fastattn.layer_norm(x, _tensor(width), _tensor(width), residual=residual)


def _rms_norm(draw: random.Random) -> Any:
    x, width = _rows(draw)
    return fastattn.rms_norm(x, _tensor(width), residual=draw.choice((None, torch.randn_like(x))))


def _ffn(draw: random.Random) -> Any:
    x, width = _rows(draw)
    hidden = draw.randint(1, 90)
    gate = draw.choice((None, _tensor(hidden, width)))
    weights = _tensor(hidden, width), _tensor(hidden), _tensor(width, hidden), _tensor(width)
    activation = draw.choice(("gelu", "gelu_tanh", "relu", "silu"))
    return fastattn.ffn(x, *weights, activation, gate=gate, recompute=draw.random() < 0.5)


def _merge(draw: random.Random) -> Any:
    parts, batch, seqlen, heads = (draw.randint(1, 4) for _ in range(4))
    return fastattn.merge_attention_states(
        [_tensor(batch, seqlen, heads, 8) for _ in range(parts)],
        [_tensor(batch, heads, seqlen) for _ in range(parts)],
    )


def _linear(draw: random.Random) -> Any:
    x, width = _rows(draw)
    hidden, activation = draw.randint(1, 90), draw.choice(("gelu", "gelu_tanh", "relu", "silu"))
    return linear(x, _tensor(hidden, width), draw.choice((None, _tensor(hidden))), activation)


def _product(draw: random.Random) -> Any:
    return product(_tensor(draw.randint(1, 6), 256), _tensor(256, 256), _tensor(256))


def _options_of_a_loss(draw: random.Random) -> dict[str, Any]:
    names = {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.5, "softcap": 5.0}
    drawn = {name: value for name, value in names.items() if draw.random() < 0.3}
    return drawn | {"reduction": draw.choice(("mean", "sum", "none"))}


def _cross_entropy(draw: random.Random) -> Any:
    rows, classes = draw.randint(1, 40), draw.randint(2, 90)
    weight = draw.choice((None, torch.rand(classes)))
    targets = torch.zeros(rows, dtype=torch.int64)
    options = _options_of_a_loss(draw)
    return fastattn.cross_entropy(_tensor(rows, classes), targets, weight=weight, **options)


def _linear_cross_entropy(draw: random.Random) -> Any:
    rows, classes, width = draw.randint(1, 40), draw.randint(2, 90), draw.randint(1, 40)
    x, weight, bias = _tensor(rows, width), _tensor(classes, width), _tensor(classes)
    class_weight = draw.choice((None, torch.rand(classes)))
    return fastattn.linear_cross_entropy(
        x, weight, torch.zeros(rows, dtype=torch.int64), draw.choice((None, bias)),
        class_weight=class_weight, **_options_of_a_loss(draw),
    )  # fmt: skip


def _rotary(draw: random.Random) -> Any:
    batch, seqlen, head_dim = draw.randint(1, 4), draw.randint(1, 40), 2 * draw.randint(1, 40)
    q, k = (_tensor(batch, seqlen, draw.randint(1, 6), head_dim) for _ in "qk")
    cos, sin = torch.ones(2, 64, head_dim // 2)
    weight = draw.choice((None, _tensor(head_dim)))
    positions = draw.choice((None, torch.zeros(seqlen, dtype=torch.int64)))
    interleaved = draw.random() < 0.5
    return fastattn.rotary(
        q, k, cos, sin, positions=positions, interleaved=interleaved, q_weight=weight
    )


OPS: dict[str, Callable[[random.Random], Any]] = {
    "attention": _attention,
    "attention, key_lengths": _padded,
    "attention_varlen": _varlen,
    "attention_with_kv_cache": _cache,
    "merge_attention_states": _merge,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "ffn": _ffn,
    "linear": _linear,
    "linear, no activation": _product,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "rotary": _rotary,
}
# On the torch backend sequences that are padded (on a CPU), packed or in a cache are cut one by one:
# by their lengths, which the host reads; and it has neither softcap nor sink.
CUT = ("attention, key_lengths", "attention_varlen", "attention_with_kv_cache")
CASES = [
    (op, backend) for op in OPS for backend in steps.BACKENDS if (op in CUT) <= (backend != "torch")
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_no_call_waits_for_the_device(
    op: str, backend: str, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, over random shapes; kernels are launched, and not run."""
    draw = random.Random(0)
    for number in range(SHAPES):
        with fastattn.use_backend(backend), steps._recorded(), waits(monkeypatch) as found:
            result = OPS[op](draw)
            out = result if isinstance(result, torch.Tensor) else result[0]
            if out.requires_grad:
                out.backward(torch.ones_like(out))
        assert not found, f"shape {number}: {found}"


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x.amax()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
    ],
    ids=["item", "bool", "int", "tolist", "cpu", "nonzero", "mask", "equal"],
)
def test_a_wait_is_seen(reads: Callable[[torch.Tensor], Any], monkeypatch: Any) -> None:
    x = torch.arange(4)
    with waits(monkeypatch) as found:
        x + 1
        assert not found
        reads(x)
        assert found
