"""The kernel backends' way in: `torch.ops.fastattn.attention_with_kv_cache`.

Opaque to torch.compile, with a fake implementation for tracing; the caches are written in place.
"""

from __future__ import annotations

import torch

from fastattn import backends
from fastattn.ops.attention.cache.call import EXTRAS, SETTINGS, CacheCall
from fastattn.ops.attention.cache.problem import CacheProblem
from fastattn.ops.attention.call import Extras, Settings, schema
from fastattn.ops.common import autograd

BACKENDS = backends.of_op("fastattn.ops.attention.cache", without=("gluon",))

_CALL = len(CacheCall._fields)
_END = _CALL + len(EXTRAS)


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
        q, *call, *[getattr(extras, name) for name in EXTRAS],
        *[getattr(settings, name) for name in SETTINGS], backend,
    )  # fmt: skip


def _forward(q, *call):  # type: ignore[no-untyped-def]
    extras = Extras(**dict(zip(EXTRAS, call[_CALL:_END])))
    settings = Settings(top_left=False, **dict(zip(SETTINGS, call[_END:-1])))
    kernel = backends.module_of(BACKENDS, call[-1])
    return kernel.forward(q, extras, settings, CacheCall(*call[:_CALL]))


def _forward_fake(q, k_cache, v_cache, *rest):  # type: ignore[no-untyped-def]
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, heads, v_cache.shape[-1]))
    return out, q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


autograd.define(
    "attention_with_kv_cache(Tensor q, Tensor(a!) k, Tensor(b!) v, "
    f"{schema(CacheCall, CacheCall._fields[2:])}, {schema(Extras, EXTRAS)}, "
    f"{schema(Settings, SETTINGS)}, str backend) -> (Tensor out, Tensor lse)",
    _forward, _forward_fake,
)  # fmt: skip
