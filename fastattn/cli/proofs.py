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
from fastattn.ops.common import launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 128)


def prove(devices: list[torch.device]) -> int:
    """Prove typical families of all ops; 1 if one failed, else 0."""
    verdicts: list[bool] = []
    for device in devices:
        if device.type == "cpu" and backends.FOR_TESTS:
            continue
        print(f"proofs on {device}")
        for backend, problem in _kernels(device):
            about = proving.subject(backend, problem)
            if about is None:
                continue
            if (reason := proving.impossible(device)) is not None:
                print(f"  stopped: {reason}")
                return 1
            with _compilations() as compiled:
                verdict = proving.prove_now(about, problem, again=True)
            label = f"{backend} {about.op}, {about.family}"
            if verdict is None:
                print(f"  left out  {label}: another process proves it, or memory is short")
                continue
            verdicts.append(verdict.passed)
            print(f"  {'passed' if verdict.passed else 'FAILED':<8}  {label}: {verdict.told}")
            if compiled:
                print(f"{'':12}compiled: {', '.join(_seconds(compiled))}")
        print()
    if not verdicts:
        print("no kernel to prove: none can run on a device of this machine")
    return 0 if all(verdicts) else 1


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


def _kernels(device: torch.device) -> Iterator[tuple[str, Any]]:
    for dtype in DTYPES:
        for function, args, kwargs in _calls(dtype, device):
            problem, kernels = backends.problem_of(function, *args, **kwargs)
            for kernel in kernels:
                yield kernel.name, problem


def _calls(
    dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Calls as models make them; their tensors are described, never computed on."""

    def empty(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=grad)

    for grad in (False, True):
        for head_dim in HEAD_DIMS:
            q = empty(1, 128, 4, head_dim, grad=grad)
            k = empty(1, 128, 2, head_dim)
            for causal in (False, True):
                yield fastattn.attention, (q, q, q), {"causal": causal}
                yield fastattn.attention, (q, k, k), {"causal": causal}
        weights = (empty(256, 128), empty(256), empty(128, 256), empty(128))
        yield fastattn.ffn, (empty(16, 128, grad=grad), *weights), {}
    x, weight = empty(16, 128), empty(128)
    for residual in (None, x):
        yield fastattn.layer_norm, (x, weight, weight, 1e-5, residual), {}
        yield fastattn.rms_norm, (x, weight, 1e-6, residual), {}
