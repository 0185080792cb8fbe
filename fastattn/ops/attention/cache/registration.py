"""The kernel backends' way in: `torch.ops.fastattn.attention_with_kv_cache`.

Opaque to torch.compile, with a fake implementation for tracing; the caches are written in place.
"""

from __future__ import annotations

import torch

from fastattn import backends
from fastattn.ops.attention.cache.call import CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem
from fastattn.ops.attention.call import Extras, Settings
from fastattn.ops.common import autograd

BACKENDS = backends.of_op("fastattn.ops.attention.cache", without=("gluon",))


def run_kernel(
    backend: str,
    forced: bool,
    problem: CacheProblem,
    q: torch.Tensor,
    extras: Extras,
    call: CacheCall,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call on a kernel backend."""
    settings = problem.attention.settings
    return torch.ops.fastattn.attention_with_kv_cache(
        q, *call, extras.alibi_slopes, extras.sink, settings.window_left, settings.window_right,
        settings.softmax_scale, settings.softcap, backend,
    )  # fmt: skip


_CALL = len(CacheCall._fields)


def _forward(q, *call):  # type: ignore[no-untyped-def]
    slopes, sink, window_left, window_right, softmax_scale, softcap, backend = call[_CALL:]
    settings = Settings(
        window_left, window_right, False, softmax_scale, softcap, 0.0, "ieee", 0, 0, 0, 0
    )
    extras = Extras(alibi_slopes=slopes, sink=sink)
    kernel = backends.module_of(BACKENDS, backend)
    return kernel.forward(q, extras, settings, CacheCall(*call[:_CALL]))


def _forward_fake(q, k_cache, v_cache, *rest):  # type: ignore[no-untyped-def]
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, heads, v_cache.shape[-1]))
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


autograd.define(
    "attention_with_kv_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_lengths, Tensor? k, Tensor? v, Tensor? block_table, Tensor? cache_indices, "
    "Tensor? cache_starts, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? k_scale, "
    "Tensor? v_scale, bool rotary_interleaved, bool rotary_advances, SymInt? num_splits, "
    "Tensor? alibi_slopes, Tensor? sink, SymInt window_left, SymInt window_right, "
    "float softmax_scale, float softcap, str backend) "
    "-> (Tensor out, Tensor lse)",
    _forward, _forward_fake,
)  # fmt: skip
