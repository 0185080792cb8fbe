"""How the kernels on a key-value cache prove themselves: small problems by kind (proving.py).

A problem has several calls: no plan knows whether rotated pairs are interleaved, nor whether a
sequence has scales of its own, and the number of queries chooses between kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastattn import proving
from fastattn.ops.attention import proof as of_attention
from fastattn.ops.attention import reference as attention
from fastattn.ops.attention.cache import reference, registration, stored
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem, describe
from fastattn.ops.attention.call import UNBOUNDED, Extras

# More keys than a part of a sequence that is split has; pages of no power of two.
CAPACITY, PAGE = 600, 48
LENGTHS, STARTS = (523, 77), (5, 60)
NEW = 3  # keys that are appended
KV_HEADS = 2
# Rows to a key head (queries times query heads) of one tile, of two, and of many.
ROWS, MANY_QUERIES = (16, 32), 70
# Numbers of few bits, so that they are the same in every dtype.
SCALES = {torch.int8: (3 / 64, 5 / 128), torch.float8_e4m3fn: (3 / 256, 5 / 512)}

# Of a CacheCall, where an argument of the public function has another name.
FIELDS = {
    "k_cache": "k", "v_cache": "v", "cache_lengths": "lengths", "k": "new_k", "v": "new_v",
    "cache_indices": "indices", "cache_starts": "starts",
}  # fmt: skip

Call = tuple[str, CacheProblem, torch.Tensor, Extras, CacheCall]


def family(problem: CacheProblem) -> str | None:
    """All features that select a kernel; lengths and the size of a page are not among them."""
    of = problem.attention
    if of.is_empty:
        return None
    named = {
        "k": "new keys",
        "k_scale": f"stored as {str(problem.stored).removeprefix('torch.')}",
        "block_table": "paged",
        "rotary_cos": "rotary",
    }
    facts = [
        *of_attention.of_scores(of),
        "one query" if of.seqlen_q == 1 else "",
        *of.given,
        *(named.get(name, name) for name in problem.given),
    ]
    return ", ".join(filter(None, facts))


def inputs(problem: CacheProblem, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The tensors of the calls; float8 as its bits, which no cast touches."""
    of, given = problem.attention, problem.given
    heads, batch = KV_HEADS * of.group_size, len(LENGTHS)

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=problem.device)

    found: dict[str, Any] = {
        "q": draw(batch, 1 if of.seqlen_q == 1 else MANY_QUERIES, heads, of.head_dim),
        "cache_lengths": integers(*LENGTHS),
    }
    shape: tuple[int, ...] = (batch, CAPACITY)
    if "block_table" in given:
        pages = batch * -(-CAPACITY // PAGE)
        shape = pages, PAGE
        found["block_table"] = integers(*reversed(range(pages))).view(-1, batch).t()
    if "cache_indices" in given:
        shape = batch + 1, CAPACITY
        found["cache_indices"] = integers(2, 0)
    if "cache_starts" in given:
        found["cache_starts"] = integers(*STARTS)
    for name, width in (("k", of.head_dim), ("v", of.head_dim_v)):
        cache = draw(*shape, KV_HEADS, width)
        if "k_scale" in given:
            scale = torch.tensor(SCALES[problem.stored], device=problem.device)
            found[f"{name}_scale"] = torch.stack([scale, scale.flip(0)])
            cache = stored.bits(stored.quantised(cache, scale, problem.stored))
        found[f"{name}_cache"] = cache
        if "k" in given:
            found[name] = draw(batch, NEW, KV_HEADS, width)
    if "rotary_cos" in given:
        found |= _rotary(problem, draw)
    if "alibi_slopes" in of.given:
        found["alibi_slopes"] = draw(heads).float().abs() / 8
    if "sink" in of.given:
        found["sink"] = draw(heads)
    return found


def _rotary(problem: CacheProblem, draw: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tables of angles; for an 8-bit cache quarter turns, which are exact in every dtype.

    Else the rounding of a rotated key would now and then be a whole step of 8 bits.
    """
    turns = draw(CAPACITY + PAGE, problem.attention.head_dim // 2).float()
    if "k_scale" in problem.given:
        turns = (4 * turns).round() / 4
    angles = 2 * math.pi * turns
    cos, sin = (x.to(problem.dtype) for x in (angles.cos(), angles.sin()))
    if "k_scale" in problem.given:
        cos, sin = cos.round(), sin.round()
    return {"rotary_cos": cos, "rotary_sin": sin}


def kernel(problem: CacheProblem, given: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The results by name, from a backend."""
    found: dict[str, torch.Tensor] = {}
    for name, small, q, extras, call in _calls(problem, given):
        out, lse = registration.run_kernel(backend, True, small, q, extras, call)
        found |= _named(name, out, lse, call)
    return found


def formula(problem: CacheProblem, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results by name, in the dtype of the tensors."""
    found: dict[str, torch.Tensor] = {}
    for name, small, q, extras, call in _calls(problem, given):
        if extras.alibi_slopes is not None:
            extras = extras._replace(alibi_slopes=extras.alibi_slopes.to(q.dtype))
        q = reference.rotated_queries(q, call)
        lengths = reference.append(call)
        k, v = reference.held(call, q.dtype)
        out, lse = attention.formula_on_lengths(
            small.attention, q, k, v, extras, lengths, call.starts
        )
        found |= _named(name, out, lse, call)
    return found


def _calls(problem: CacheProblem, given: dict[str, Any]) -> Iterator[Call]:
    of, group = problem.attention, problem.attention.group_size
    several = sorted({MANY_QUERIES, *(max(2, rows // group) for rows in ROWS)})
    for number, queries in enumerate((1, 1) if of.seqlen_q == 1 else several):
        odd = number % 2 == 1
        tensors = dict(given)
        q, slopes, sink = (tensors.pop(name, None) for name in ("q", "alibi_slopes", "sink"))
        q = q[:, :queries]
        for name in ("k_cache", "v_cache"):  # written in place
            tensors[name] = tensors[name].clone()
            if problem.stored == torch.float8_e4m3fn:
                tensors[name] = tensors[name].view(problem.stored)
        for name in {"k_scale", "v_scale"} & tensors.keys():
            tensors[name] = (tensors[name] if odd else tensors[name][0]).float()
        for name in {"rotary_cos", "rotary_sin"} & tensors.keys():
            if odd:  # the rest of a head is not rotated
                tensors[name] = tensors[name][:, : max(1, tensors[name].shape[1] // 2)]
        small = describe(
            q, **tensors, alibi_slopes=slopes, sink=sink, **_options(problem), return_lse=True
        )
        fields: dict[str, Any] = dict.fromkeys(CacheCall._fields)
        fields |= {FIELDS.get(name, name): x for name, x in tensors.items()}
        fields["rotary_interleaved"] = odd
        fields["rotary_advances"] = of.bounded_left or of.bounded_right
        extras = Extras(alibi_slopes=None if slopes is None else slopes[None].float(), sink=sink)
        yield f"of call {number}", small, q, extras, CacheCall(**fields)


def _options(problem: CacheProblem) -> dict[str, Any]:
    """The other arguments of the calls."""
    s = problem.attention.settings
    left = of_attention.LEFT if problem.attention.bounded_left else UNBOUNDED
    right = min(s.window_right, of_attention.RIGHT)
    return {
        "causal": right == 0,
        "window": (left, right) if left >= 0 or right > 0 else None,
        "softcap": s.softcap,
    }


def _named(
    name: str, out: torch.Tensor, lse: torch.Tensor, call: CacheCall
) -> dict[str, torch.Tensor]:
    """The results of a call, and the caches that it has written, as numbers."""
    found = {f"out {name}": out, f"lse {name}": lse}
    if call.new_k is not None:
        caches = (x if call.k_scale is None else x.float() for x in (call.k, call.v))
        found |= zip((f"k_cache {name}", f"v_cache {name}"), caches)
    return found


PROOF = proving.Proof(family, inputs, kernel, formula)
