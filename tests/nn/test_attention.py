"""nn.Attention against the plain formula: outputs and every gradient, caches, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn.compare import assert_module_close
from nn.formulas import attended

from fastattn.nn import Attention, KeyValueCache, PackedSequences, RotaryEmbedding, SequencePart
from oracle import assert_close_to_reference

EMBED, HEADS, BATCH, LENGTH, KEYS = 24, 4, 3, 7, 9


def _attention(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Attention:
    """With every parameter random, so that none could be left out unnoticed."""
    module = Attention(EMBED, HEADS, dtype=dtype, **kwargs)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def _angles(module: Attention, rotary_dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    angles = RotaryEmbedding(rotary_dim or module.head_dim, 100.0)
    return angles(torch.randint(0, 50, (BATCH, LENGTH)))


# What differs from plain self-attention in one way, and whether q and k are turned.
SELF: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({}, True),
    ({"num_kv_heads": 2, "head_dim": 10}, True),
    ({"num_kv_heads": 1, "bias": False}, False),
    ({"bias": False, "out_bias": True}, False),
    ({"window": (2, 1)}, True),
    ({"window": (-1, 0)}, False),
    ({"softmax_scale": 1.3}, False),
    ({"qk_norm": "head"}, False),
    ({"qk_norm": "head", "num_kv_heads": 2}, True),
    ({"qk_norm": "head", "norm_offset": True, "norm_eps": 0.1}, True),
    ({"qk_norm": "head", "norm_offset": True}, False),
    ({"qk_norm": "all", "num_kv_heads": 2}, True),
    ({"qk_norm": "all", "norm_offset": True}, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kwargs", "turns"), SELF, ids=str)
def test_self_attention(kwargs: dict[str, Any], turns: bool, dtype: torch.dtype) -> None:
    module = _attention(dtype, **kwargs)
    rotary = _angles(module) if turns else None
    assert_module_close(
        module,
        module,
        torch.randn(BATCH, LENGTH, EMBED, dtype=dtype),
        call=lambda m, x: m(x, rotary=rotary),
        call_theirs=lambda m, x: attended(m, x, rotary=rotary),
    )


@pytest.mark.parametrize("rotary_dim", [4, 6, 8])  # of 12 elements
@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": "head"}], ids=["plain", "normed"])
def test_a_part_of_a_head_turns(kwargs: dict[str, Any], rotary_dim: int) -> None:
    module = _attention(head_dim=12, **kwargs)
    rotary = _angles(module, rotary_dim)
    assert_module_close(
        module,
        module,
        torch.randn(BATCH, LENGTH, EMBED),
        call=lambda m, x: m(x, rotary=rotary),
        call_theirs=lambda m, x: attended(m, x, rotary=rotary),
    )


@pytest.mark.parametrize("softcap", [1.5, 20.0])
def test_softcap(softcap: float) -> None:
    module, x = _attention(softcap=softcap), torch.randn(BATCH, LENGTH, EMBED)
    exact = attended(copy.deepcopy(module).double(), x.double(), causal=True)
    ours, eager = module(x, causal=True), attended(module, x, causal=True)
    assert_close_to_reference(ours, eager, exact, max_factor=3, rms_factor=2)
    uncapped = copy.deepcopy(module)
    uncapped.softcap = 0.0
    assert (uncapped(x, causal=True) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, {"num_kv_heads": 2}, {"bias": False}], ids=str)
def test_cross_attention(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    module = _attention(dtype, cross=True, **kwargs)
    lengths = torch.tensor([KEYS, 1, 4])
    assert_module_close(
        module,
        module,
        torch.randn(BATCH, LENGTH, EMBED, dtype=dtype),
        torch.randn(BATCH, KEYS, EMBED, dtype=dtype),
        call=lambda m, x, context: m(x, context, key_lengths=lengths),
        call_theirs=lambda m, x, context: attended(m, x, context, key_lengths=lengths),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_mask_lengths_and_a_bias_with_gradient(causal: bool) -> None:
    module = _attention(num_kv_heads=2)
    mask = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.6
    mask[..., 0] = True  # every row sees a key
    hides: dict[str, Any] = {
        "mask": mask, "key_lengths": torch.tensor([LENGTH, 1, 5]), "causal": causal
    }  # fmt: skip
    assert_module_close(
        module,
        module,
        torch.randn(BATCH, LENGTH, EMBED),
        torch.randn(1, HEADS, LENGTH, LENGTH),  # the bias
        call=lambda m, x, bias: m(x, bias=bias, **hides),
        call_theirs=lambda m, x, bias: attended(m, x, bias=bias, **hides),
    )


def test_dropout_acts_in_training_only() -> None:
    module, x = _attention(dropout=0.5), torch.randn(BATCH, LENGTH, EMBED)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    module.dropout = 0.0
    torch.testing.assert_close(module(x), module.eval()(x))


def test_padding_of_the_context_may_hold_anything() -> None:
    module = _attention(cross=True)
    x, context = torch.randn(2, LENGTH, EMBED), torch.randn(2, KEYS, EMBED)
    lengths = torch.tensor([3, KEYS])
    expected = module(x, context, key_lengths=lengths)
    context[0, 3:] = torch.nan
    assert torch.equal(module(x, context, key_lengths=lengths), expected)


def _memory(module: Attention, paged: bool, rows: int = BATCH) -> KeyValueCache:
    """An empty cache for 12 tokens a sequence, whose slots hold NaN: only written ones count."""
    shape: tuple[int, ...] = (rows, 12)
    table = None
    if paged:  # pages of 4 slots, in any order
        shape = (rows * 3, 4)
        table = torch.randperm(rows * 3).view(rows, 3)
    keys, values = torch.full((2, *shape, module.num_kv_heads, module.head_dim), torch.nan)
    return KeyValueCache(keys, values, torch.zeros(rows, dtype=torch.int64), table)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{"num_kv_heads": 2}, {"window": (2, 0)}, {"qk_norm": "head"}], ids=str
)
@torch.no_grad()
def test_the_cache_gives_what_the_whole_sequence_gives(kwargs: dict[str, Any], paged: bool) -> None:
    module = _attention(**kwargs)
    cache, angles = _memory(module, paged), RotaryEmbedding(module.head_dim)
    x = torch.randn(BATCH, LENGTH, EMBED)
    # Prompts of unequal lengths, padded on the right; their padding is written over.
    starts = torch.tensor([3, 1, 2])
    module(x[:, :3], causal=True, rotary=angles(torch.arange(3)), cache=cache)
    cache.lengths.copy_(starts)
    outs = []
    for step in range(LENGTH - 3):
        positions = (starts + step)[:, None]
        token = x.gather(1, positions[..., None].expand(-1, -1, EMBED))
        outs.append(module(token, causal=True, rotary=angles(positions), cache=cache))
        cache.lengths.add_(1)
    rotary = angles(torch.arange(LENGTH))
    exact = copy.deepcopy(module).double()
    for row, start in enumerate(starts.tolist()):
        whole = x[row : row + 1, : start + len(outs)]
        turns = tuple(t[:, : whole.shape[1]] for t in rotary)
        eager, reference = (
            attended(m, y, causal=True, rotary=turns)[0, start:]
            for m, y in ((module, whole), (exact, whole.double()))
        )
        ours = torch.cat(outs, 1)[row]
        assert_close_to_reference(ours, eager, reference, name=f"row {row}")


@torch.no_grad()
def test_keys_and_values_of_a_context_are_made_once() -> None:
    module, x = _attention(cross=True, num_kv_heads=2), torch.randn(2, LENGTH, EMBED)
    context, lengths = torch.randn(2, KEYS, EMBED), torch.tensor([2, KEYS])
    made = KeyValueCache(*module.keys_and_values(context), lengths)
    assert torch.equal(module(x, made), module(x, context, key_lengths=lengths))


@pytest.mark.parametrize("kwargs", [{"num_kv_heads": 2}, {"window": (1, 1)}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_attend_to_themselves(kwargs: dict[str, Any], causal: bool) -> None:
    module, lengths = _attention(**kwargs), [3, 0, 1, 5]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    turns = RotaryEmbedding(module.head_dim)(torch.cat([torch.arange(n) for n in lengths]))

    def one_by_one(m: Attention, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for start, n in zip(starts.tolist(), lengths, strict=False):
            rows = slice(start, start + n)
            rotary = turns[0][:, rows], turns[1][:, rows]
            parts.append(attended(m, x[:, rows], causal=causal, rotary=rotary))
        return torch.cat(parts, 1)

    assert_module_close(
        module,
        module,
        torch.randn(1, sum(lengths), EMBED),
        call=lambda m, x: m(x, causal=causal, rotary=turns, packed=PackedSequences(starts, 5)),
        call_theirs=one_by_one,
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((24, 5), {}, "embed_dim=24 and num_heads=5"),
        ((24, 4, 3), {}, "num_heads=4 and num_kv_heads=3"),
        ((0, 4), {}, "embed_dim must be positive"),
        ((24, 4), {"num_kv_heads": 0}, "num_kv_heads must be positive"),
        ((24, 4), {"head_dim": -1}, "head_dim must be positive"),
        ((24, 4), {"dropout": 1.0}, "dropout must be in"),
        ((24, 4), {"qk_norm": "tail"}, "qk_norm must be one of"),
        ((24, 4), {"qk_norm": "head", "cross": True}, "qk_norm is of self-attention"),
    ],
    ids=str,
)
def test_constructor_refuses(args: tuple[int, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(*args, **kwargs)


def test_sizes_must_be_integers() -> None:
    with pytest.raises(TypeError, match="num_heads must be an integer"):
        Attention(24, 4.0)


def test_forward_refuses() -> None:
    own, cross = _attention(), _attention(cross=True)
    x, cache = torch.randn(BATCH, LENGTH, EMBED), _memory(own, paged=False)
    lengths = torch.ones(BATCH, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch, seqlen, 24"):
        own(x[..., 1:])
    with pytest.raises(ValueError, match="cross=True"):
        own(x, x)
    with pytest.raises(ValueError, match="takes a context"):
        cross(x)
    with pytest.raises(ValueError, match="neither rotary nor cache"):
        cross(x, x, cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="must be None with a cache"):
        own(x, cache=cache, key_lengths=lengths)
    packed = PackedSequences(torch.tensor([0, LENGTH]), LENGTH)
    with pytest.raises(ValueError, match="lie in one row, and x has 3"):
        own(x, packed=packed)
    with pytest.raises(ValueError, match="cache, key_lengths, mask and bias None"):
        own(x[:1], packed=packed, key_lengths=lengths[:1])
    with pytest.raises(ValueError, match="cache, key_lengths, mask and bias None"):
        cross(x[:1], x[:1], packed=packed)
    part = SequencePart(None, LENGTH)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a part of a sequence is for self-attention"):
        cross(x, x, part=part)
    with pytest.raises(ValueError, match="cache, key_lengths, mask and bias None"):
        own(x, part=part, key_lengths=lengths)
    with pytest.raises(ValueError, match="init_process_group"):
        own(x, part=part)
    dropping = _attention(dropout=0.1).train()
    with torch.no_grad(), pytest.raises(ValueError, match="call eval"):
        dropping(x, cache=cache)
