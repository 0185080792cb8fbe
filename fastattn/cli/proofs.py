"""`fastattn doctor --prove`: every kernel that can run here proves itself, and the figures.

The seconds in which Triton compiled the kernels of a proof are the wait of a first call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastattn
from fastattn import backends, proving
from fastattn.ops.attention.cache import stored
from fastattn.ops.common import launch
from fastattn.verdicts import Subject

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 128)
HIDDEN = (128, 768, 4096, 8192)  # of the norms, whose kernels are chosen by powers of two

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def prove(devices: list[torch.device]) -> int:
    """Prove typical families of all ops; 1 if one failed, or none may run, else 0."""
    if not proving.enabled():
        print(f"no proof runs: the environment variable {proving.VARIABLE} turns them off\n")
        return 1
    proved: list[bool] = []
    for device in devices:
        if device.type == "cpu" and backends.FOR_TESTS:
            continue
        print(f"proofs on {device}")
        for about, problem in _families(device):
            if (reason := proving.impossible(device)) is not None:
                print(f"  stopped: {reason}")
                return 1
            with _compilations() as compiled:
                verdict = proving.prove_now(about, problem, again=True)
            label = f"{about.backend} {about.op}, {about.family}"
            if verdict is None:
                print(f"  left out  {label}: another process proves it, or memory is short")
                continue
            proved.append(verdict.passed)
            told = "passed" if verdict.passed else "FAILED"
            print(f"  {told:<8}  {label}: {verdict.told}", flush=True)
            if compiled:
                print(f"{'':12}compiled: {', '.join(_seconds(compiled))}")
        print()
    if not proved:
        print("no kernel to prove: none can run on a device of this machine")
    else:
        print(f"{sum(proved)} of {len(proved)} families passed\n")
    return 0 if all(proved) else 1


@contextlib.contextmanager
def _compilations() -> Iterator[dict[str, float | None]]:
    """`launch.compilations`, where Triton is installed."""
    with contextlib.ExitStack() as stack:
        compiled: dict[str, float | None] = {}
        with contextlib.suppress(ImportError):
            compiled = stack.enter_context(launch.compilations())
        yield compiled


def _seconds(compiled: dict[str, float | None]) -> Iterator[str]:
    for name, seconds in compiled.items():
        yield f"{name} {'from the cache' if seconds is None else f'{seconds:.1f} s'}"


def _families(device: torch.device) -> Iterator[tuple[Subject, Any]]:
    """Each family once, and a problem of it."""
    found = set()
    for dtype in DTYPES:
        for function, args, kwargs in _calls(dtype, device):
            for autocast in (False, True) if dtype.itemsize == 2 else (False,):
                with torch.autocast(device.type, dtype, enabled=autocast):
                    problem, kernels = backends.problem_of(function, *args, **kwargs)
                for kernel in kernels:
                    about = proving.subject(kernel.name, problem)
                    if about is not None and about not in found:
                        found.add(about)
                        yield about, problem


def _calls(dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Calls as models make them; their tensors are described, never computed on."""

    def empty(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=grad)

    yield from _attention(empty)
    yield from _decoding(empty)
    x, weight = empty(16, 128), empty(128)
    for hidden in HIDDEN:
        wide, factor = empty(16, hidden), empty(hidden)
        for residual in (None, wide):
            yield fastattn.layer_norm, (wide, factor, factor, 1e-5, residual), {}
            yield fastattn.rms_norm, (wide, factor, 1e-6, residual), {}
    yield fastattn.layer_norm, (x, weight, weight, 1e-5, x), {"dropout_p": 0.1}
    yield fastattn.rms_norm, (x, weight, 1e-6, x), {"dropout_p": 0.1}
    classes, targets = 32000, torch.zeros(16, dtype=torch.int64, device=device)
    for grad in (False, True):
        x = empty(16, 128, grad=grad)
        w1, b1, w2, b2 = empty(256, 128), empty(256), empty(128, 256), empty(128)
        for activation in ("gelu_tanh", "gelu", "relu", "silu"):
            yield fastattn.ffn, (x, w1, b1, w2, b2, activation), {}
            yield fastattn.linear, (x, w1, b1, activation), {}
        yield fastattn.ffn, (x, w1, None, w2, None, "silu"), {"gate": w1}
        yield fastattn.ffn, (x, w2, b1, w1, b2), {"layout": "conv1d"}
        logits, head = empty(16, classes, grad=grad), empty(classes, 128, grad=grad)
        yield fastattn.cross_entropy, (logits, targets), {}
        yield fastattn.cross_entropy, (logits, targets), {"label_smoothing": 0.1, "softcap": 30.0}
        yield fastattn.linear_cross_entropy, (x, head, targets), {}
        yield fastattn.linear_cross_entropy, (x, head, targets), {"reduction": "none"}
        for head_dim in HEAD_DIMS:
            q, cos = empty(1, 16, 4, head_dim, grad=grad), empty(1, 16, head_dim)
            norms = {"q_weight": empty(head_dim), "k_weight": empty(head_dim)}
            for more in ({}, norms, {"interleaved": True}):
                yield fastattn.rotary, (q, q, cos, cos), more
            half = cos[..., : head_dim // 2].float()
            yield fastattn.rotary, (q, q, half, half), {}


def _attention(empty: Callable[..., torch.Tensor]) -> Iterator[Call]:
    for grad in (False, True):
        for head_dim in HEAD_DIMS:
            q, k = empty(1, 128, 4, head_dim, grad=grad), empty(1, 128, 2, head_dim)
            for causal in (False, True):
                yield fastattn.attention, (q, q, q), {"causal": causal}
                yield fastattn.attention, (q, k, k), {"causal": causal}
        device, pairs = q.device, empty(128, 128)
        numbers = torch.zeros(1, 128, dtype=torch.int32, device=device)
        for more in (
            {"causal": True, "dropout_p": 0.1},
            {"causal": True, "window": (64, 0)},
            {"causal": True, "softcap": 30.0},
            {"causal": True, "sink": empty(4)},
            {"causal": True, "alibi_slopes": torch.empty(4, device=device)},
            {"causal": True, "document_ids": numbers},
            {"causal": True, "return_lse": True},
            {"causal": True, "deterministic": False},
            {"key_lengths": numbers[:, 0]},
            {"mask": pairs > 0},
            {"bias": pairs},
            {"bias": empty(128, 128, grad=grad)},
            {"block_mask": _block_mask(device)},
        ):
            yield fastattn.attention, (q, k, k), more
        starts = torch.tensor([0, 128], dtype=torch.int32, device=device)
        for causal in (False, True):
            packed = q[0], k[0], k[0], starts, starts, 128, 128
            yield fastattn.attention_varlen, packed, {"causal": causal}


def _block_mask(device: torch.device) -> fastattn.BlockMask:
    def seen(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i - j).abs() < 64

    return fastattn.BlockMask.from_predicate(seen, 1, 1, 128, 128, device=device)


def _decoding(empty: Callable[..., torch.Tensor]) -> Iterator[Call]:
    for head_dim in HEAD_DIMS:
        held, new = empty(1, 256, 2, head_dim), empty(1, 1, 2, head_dim)
        lengths = torch.zeros(1, dtype=torch.int32, device=held.device)
        angles = torch.empty(256, head_dim // 2, device=held.device)
        scale = torch.ones(2, device=held.device)
        added = {"k": new, "v": new}
        paged = {"block_table": lengths[:, None], **added}
        turned = {"rotary_cos": angles, "rotary_sin": angles}
        scales = {"k_scale": scale, "v_scale": scale}
        for queries in (1, 16):
            q = empty(1, queries, 8, head_dim)
            for more in ({}, added, paged, added | turned, paged | turned):
                yield fastattn.attention_with_kv_cache, (q, held, held, lengths), more
            for dtype in stored.DTYPES:
                cache = held.to(dtype)
                call = q, cache, cache, lengths
                yield fastattn.attention_with_kv_cache, call, paged | scales
        one = empty(1, 1, 2, head_dim)  # a head to a key
        yield fastattn.attention_with_kv_cache, (one, held, held, lengths), paged
