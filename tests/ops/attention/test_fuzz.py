"""Whole configurations of attention from a seed: features combined, on every backend.

pytest -m fuzz --draws 10000          # any number; with pytest-xdist also -n 8
pytest tests/ops/attention/test_fuzz.py --seed 1234 --draws 1     # one of them again
"""

from __future__ import annotations

import random
import traceback
from typing import Any

import pytest
import torch
from ops.attention.cases import LAYOUTS, Case, check, runnable
from ops.backends import BACKENDS

SEQLENS = (0, 1, 2, 3, 7, 17, 63, 64, 65, 113, 127, 128, 129, 203, 256, 257)
HEAD_DIMS = (1, 8, 16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256, 512)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FEATURES = (
    "causal", "window", "softmax_scale", "softcap", "bias", "sink", "mask", "alibi", "lengths",
    "documents", "block_mask", "dropout_p",
)  # fmt: skip
CHUNK = 5  # draws of one test

# Tiles of scores that Triton's interpreter visits for one draw, of 32 x 32, or 16 x 16 for wide
# heads: larger draws are drawn again, so that every length and width stays in the list.
MOST_TILES = 30


def draw(seed: int, device: str) -> Case:
    """The case of a seed; `device` changes nothing but where it runs."""
    random_ = random.Random(seed)
    while True:
        case = _draw(random_, seed, device)
        if tiles(case) <= MOST_TILES:
            return case


def tiles(case: Case) -> int:
    side = 32 if max(case.head_dim, case.head_dim_v or 0) <= 128 else 16
    batch, *_ = case.sizes()
    pairs = case.packed or [(case.seqlen_q, case.seqlen_k)] * batch
    return case.heads * sum(-(-n // side) * -(-m // side) for n, m in pairs)


def _draw(random_: random.Random, seed: int, device: str) -> Case:
    def flags() -> tuple[int, ...]:
        return tuple(random_.choice((0, 0, 1)) for _ in range(4))

    kv_heads = random_.choice((1, 1, 2, 3))
    head_dim = random_.choice(HEAD_DIMS)
    fields: dict[str, Any] = {
        "heads": kv_heads * random_.choice((1, 1, 2, 3)),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": random_.choice((None, None, random_.choice(HEAD_DIMS))),
        "layout": random_.choice(LAYOUTS),
        "dtype": random_.choices(DTYPES, (5, 4, 1, 1))[0],
        "fp32_precision": random_.choice(("ieee", "tf32x3")),
    }
    packed = random_.random() < 0.4
    if packed:
        count = random_.choice((0, 1, 1, 2, 2, 3, 4))
        fields["packed"] = tuple(
            (random_.choice(SEQLENS), random_.choice(SEQLENS)) for _ in range(count)
        )
        fields["used"] = random_.random() < 0.4
        fields["tail"] = random_.choice((0, 0, 1, 70))
    else:
        fields["batch"] = random_.choice((1, 1, 2, 3))
        fields["seqlen_q"] = random_.choice(SEQLENS)
        fields["seqlen_k"] = random_.choice(SEQLENS)
    # From none to nearly all of the features, each as likely as the others.
    share = random_.choice((0.0, 0.15, 0.3, 0.6))
    chosen = {name for name in FEATURES if random_.random() < share}
    if {"window", "block_mask"} <= chosen:  # they exclude each other
        chosen.discard(random_.choice(("window", "block_mask")))
    if packed:  # `used` takes the place of key_lengths
        chosen.discard("lengths")
    sides = (-1, 0, 1, 5, 31, 64, 100)
    options = {
        "causal": lambda: random_.choice((True, "bottom_right", "top_left")),
        "window": lambda: (random_.choice(sides), random_.choice(sides)),
        "softmax_scale": lambda: random_.choice((0.0, -0.3, 0.02, 0.5)),
        "softcap": lambda: random_.choice((1.0, 5.0, 50.0)),
        "bias": flags,
        "sink": lambda: True,
        "mask": flags,
        "alibi": lambda: random_.choice(("heads", "batch")),
        "lengths": lambda: True,
        "documents": lambda: random_.choice(("sorted", "scattered")),
        "block_mask": lambda: random_.choice(((16, 16), (16, 64), (64, 32), (128, 128))),
        "dropout_p": lambda: random_.choice((0.01, 0.3, 0.9)),
    }
    for name in FEATURES:  # not in the order of a set, which no seed fixes
        if name in chosen:
            fields[name] = options[name]()
    if fields.get("packed") == ():
        fields.pop("block_mask", None)  # there is no block mask of no sequence
    fields["in_float32"] = bool({"bias", "sink"} & chosen) and random_.random() < 0.3
    return Case(**fields, device=device, seed=seed)


@pytest.mark.fuzz
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws(first: int, count: int, backend: str, device: str) -> None:
    failures = []
    for seed in range(first, first + count):
        case = runnable(draw(seed, device), backend)
        try:
            check(case, backend)
        except Exception as error:
            reason = "".join(traceback.format_exception_only(error)).strip()
            failures.append(
                f"{reason}\n  {shortly(case)}\n"
                f"  pytest tests/ops/attention/test_fuzz.py --seed {seed} --draws 1 -k {backend}"
            )
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


def shortly(case: Case) -> str:
    """The case without the fields that are at their defaults."""
    default = Case()
    fields = {name: value for name, value in vars(case).items() if value != getattr(default, name)}
    return f"Case({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def test_the_default_draws_leave_nothing_out() -> None:
    """Every length, width, layout, dtype and feature, and every pair of features that may meet."""
    drawn = [draw(seed, "cpu") for seed in range(240)]
    pairs = [pair for c in drawn for pair in (c.packed or ((c.seqlen_q, c.seqlen_k),))]
    assert set(SEQLENS) == {n for n, _ in pairs} == {m for _, m in pairs}
    assert set(HEAD_DIMS) == {c.head_dim for c in drawn} == {c.head_dim_v for c in drawn} - {None}
    assert {c.layout for c in drawn} == set(LAYOUTS) and {c.dtype for c in drawn} == set(DTYPES)
    default = Case()
    used = [
        {name for name in (*FEATURES, "packed", "used", "tail") if getattr(c, name) != getattr(default, name)}
        for c in drawn
    ]  # fmt: skip
    for one in FEATURES:
        for other in FEATURES:
            if {one, other} != {"window", "block_mask"}:
                assert any({one, other} <= features for features in used), (one, other)
        assert one == "lengths" or any({one, "packed"} <= features for features in used), one
    assert draw(3, "cpu") == draw(3, "cpu")
