"""The kernel backends' way in: `torch.ops.fastattn.attention_with_kv_cache`.

Opaque to torch.compile, with a fake implementation for tracing; the caches are written in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastattn import backends
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.attention.problem import AttentionProblem
from fastattn.ops.common import faster


def _load_cuda() -> ModuleType:
    from fastattn.ops.attention.cache import cuda

    return cuda


def _load_triton() -> ModuleType:
    from fastattn.ops.attention.cache import triton

    return triton


KERNELS = (
    backends.Backend("cuda", _load_cuda, faster.declined),
    backends.Backend("triton", _load_triton),
)

_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "attention_with_kv_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_lengths, Tensor? k, Tensor? v, Tensor? block_table, Tensor? cache_indices, "
    "Tensor? cache_starts, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    "bool rotary_advances, SymInt? num_splits, Tensor? alibi_slopes, Tensor? sink, "
    "SymInt window_left, SymInt window_right, float softmax_scale, float softcap, str backend) "
    "-> (Tensor out, Tensor lse)"
)


def entry(backend: backends.Backend) -> Callable[..., Any]:
    """What runs a call on `backend`: f(problem, q, extras, call) -> (out, lse)."""
    if backend.name in ("torch", "reference"):
        return backend.module.attention_with_kv_cache
    return functools.partial(_through_registered_op, backend.name)


def _through_registered_op(
    backend: str, problem: AttentionProblem, q: torch.Tensor, extras: Extras, call: CacheCall
) -> tuple[torch.Tensor, torch.Tensor]:
    settings = problem.settings
    return torch.ops.fastattn.attention_with_kv_cache(
        q, *call, extras.alibi_slopes, extras.sink, settings.window_left, settings.window_right,
        settings.softmax_scale, settings.softcap, backend,
    )  # fmt: skip


@functools.cache
def _kernel(name: str) -> Any:
    return next(b for b in KERNELS if b.name == name).module


_CALL = len(CacheCall._fields)


def _forward(q, *call):  # type: ignore[no-untyped-def]
    slopes, sink, window_left, window_right, softmax_scale, softcap, backend = call[_CALL:]
    settings = Settings(
        window_left, window_right, False, softmax_scale, softcap, 0.0, "ieee", 0, 0, 0, 0
    )
    extras = Extras(alibi_slopes=slopes, sink=sink)
    return _kernel(backend).forward(q, extras, settings, CacheCall(*call[:_CALL]))


def _forward_fake(q, k_cache, v_cache, *rest):  # type: ignore[no-untyped-def]
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, heads, v_cache.shape[-1]))
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


_library.impl("attention_with_kv_cache", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention_with_kv_cache", _forward_fake, lib=_library)
