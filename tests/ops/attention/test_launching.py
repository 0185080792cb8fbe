"""Launches by the compiled kernel that a plan keeps hand over what Triton's own way does.

Each case runs in a process in which Triton compiles, with a driver that notes its launches.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_kept_kernels_get_the_same_arguments() -> None:
    in_a_process("triton")


def test_kept_gluon_kernels_get_descriptors_of_this_calls_tensors() -> None:
    if importlib.metadata.version("triton") < "3.8":
        pytest.skip("the stub has the launcher of Triton 3.8")
    in_a_process("gluon")


def in_a_process(name: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, __file__, name], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def of_triton() -> None:
    import stub_driver
    import torch

    from fastattn.ops.attention import triton as kernels
    from fastattn.ops.attention.call import NO_GRADIENT, Extras, Settings
    from fastattn.ops.common import launch

    noted: list[tuple[Any, ...]] = []
    settings = Settings(-1, 0, False, 0.125, 0.0, 0.0, "ieee", 0, 0, 0, 0)

    def arguments(*given: Any) -> None:
        # Results are new tensors each time: of a tensor counts what the kernel was compiled for.
        noted.append(
            tuple(
                (x.dtype, x.shape, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x
                for x in (*given[:3], *given[9:])
            )
        )

    def decoding(q: Any, k: Any) -> list[tuple[Any, ...]]:
        noted.clear()
        kernels.forward(q, k, k, Extras(), settings)
        return list(noted)

    def launches(q: Any, extras: Extras, settings: Settings) -> list[tuple[Any, ...]]:
        noted.clear()
        out, lse = kernels.forward(q, q, q, extras, settings)
        kernels.backward(out, None, out, lse, NO_GRADIENT, q, q, q, extras, settings)
        return list(noted)

    storage = torch.randn(2 * 32 * 2 * 16 + 1, dtype=torch.bfloat16)
    q, misaligned = storage[:-1].view(2, 32, 2, 16), storage[1:].view(2, 32, 2, 16)
    lengths = Extras(key_lengths=torch.tensor([20, 32], dtype=torch.int32))
    ids = torch.arange(64, dtype=torch.int32).view(2, 32) // 10
    documents = Extras(q_documents=ids, k_documents=ids)
    bound_by_triton: list[Any] = []
    binder = launch.launch

    def counted(kernel: Any, *rest: Any, **constants: Any) -> Any:
        bound_by_triton.append(kernel)
        return binder(kernel, *rest, **constants)

    launch.launch = counted
    stub_driver.install(arguments)
    with torch.no_grad():
        for extras, given, number in (
            (Extras(), settings, 4),  # forward, delta, keys, queries
            (lengths, settings._replace(window_left=7), 4),
            (documents, settings, 7),  # and the ranges of three of them
        ):
            bound_by_triton.clear()
            first = launches(q, extras, given)
            assert len(first) == len(bound_by_triton) == number
            bound_by_triton.clear()
            assert launches(q, extras, given) == first
            assert not bound_by_triton, "the second call launches what the plan keeps"
            # An address that is no multiple of 16 is for another kernel, and Triton finds it.
            launches(misaligned, extras, given)
            assert len(bound_by_triton) == 3, "forward, keys, queries: the others read no q"
            with launch.recorded() as recorded:
                assert launches(q, extras, given) == first
            assert len(recorded) == number

        keys = torch.randn(2, 4096, 2, 16, dtype=torch.bfloat16)
        first = decoding(q[:, :1], keys)
        assert len(first) == 2, "forward, merge"
        bound_by_triton.clear()
        assert decoding(q[:, :1], keys) == first
        assert not bound_by_triton


def of_gluon() -> None:
    import stub_driver
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastattn.ops.attention import gluon as kernels
    from fastattn.ops.attention.call import NONE, Extras, Settings
    from fastattn.ops.common import gluon_products as products
    from fastattn.ops.common import launch

    noted: list[tuple[Any, ...]] = []
    bound_by_triton: list[Any] = []
    binder = launch.launch
    settings = Settings(-1, 0, False, 0.125, 0.0, 0.0, "ieee", 3, 3, 0, 0)

    def counted(kernel: Any, *rest: Any, **constants: Any) -> Any:
        bound_by_triton.append(kernel)
        return binder(kernel, *rest, **constants)

    def tensors(tokens: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(torch.randn(*tokens, 2, 64, dtype=torch.bfloat16) for _ in range(3))

    def call(given: tuple[Any, ...], extras: Extras = NONE) -> tuple[list[int], list[Any]]:
        """The addresses in the launch, and all else."""
        noted.clear()
        out, lse = kernels.forward(*given, extras, settings)
        (arguments,) = noted
        described = [x for x in arguments[9:] if isinstance(x, tuple)]
        assert [x[0] for x in described] == [x.data_ptr() for x in (*given, out)]
        assert [x.data_ptr() for x in arguments[9:11]] == [lse.data_ptr(), out.data_ptr()]
        rest = [x[1:] if isinstance(x, tuple) else x for x in arguments[11:]]
        return [x[0] for x in described], [
            (x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in rest
        ]

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen = set[str]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            self.seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    launch.launch = counted
    stub_driver.install(lambda *given: noted.append(given))
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = Extras(cu_seqlens_q=starts, cu_seqlens_k=starts.long(), sink=torch.zeros(2))
    for tokens, extras in (((1, 5), NONE), ((5,), packed)):
        bound_by_triton.clear()
        given = tensors(tokens)
        with launch.compilations() as seconds:
            addresses, first = call(given, extras)
        assert list(seconds) == ["attention_forward"]
        assert len(bound_by_triton) == 1
        other = tensors(tokens)
        others, second = call(other, extras)
        assert second == first and not set(addresses[:3]) & set(others)
        assert len(bound_by_triton) == 1, "the second call launches what the plan keeps"
        with launch.recorded() as recorded:
            assert call(given, extras)[1] == first
        (its,) = recorded
        compiled = its.kernel[its.grid](*its.args, **its.constants)

        # Nothing keeps a tensor.
        alive = weakref.ref(given[0])
        del given, recorded, its
        noted.clear()
        assert alive() is None

        # What a CUDA graph captures: no scratch memory, which is the host's to allocate, no value
        # that the host waits for, and the descriptors themselves among the launch's parameters.
        assert compiled.metadata.global_scratch_size == compiled.metadata.profile_scratch_size == 0
        assert compiled.asm["ptx"].count(".param .align 64 .b8 attention_forward_param_") == 4
        with Operators() as operators:
            kernels.forward(*other, extras, settings)
        of_packed = {"zero_", "fill_", "unsqueeze"} if extras is packed else set[str]()
        assert operators.seen == {"new_empty", *of_packed}

    # Its cluster is kept too: the grid is of clusters, the driver multiplies it by their programs.
    for rows, programs, grid in ((400, 2, 2), (400, 2, 2), (192, 1, 1)):
        noted.clear()
        x, weight, out = (torch.zeros(rows, n).bfloat16() for n in (64, 256, 256))
        products.product(out, x, weight[:64])
        (given,) = noted
        _, ctas, *_ = given[5]  # warps, programs of a cluster, shared memory
        assert (given[:3], ctas) == ((grid, 1, 1), programs)

    # Threads share what is kept, and each launch has the addresses of one call.
    noted.clear()
    sets = [tensors((1, 5)) for _ in range(4)]

    def repeated(given: tuple[Any, ...]) -> None:
        for _ in range(50):
            kernels.forward(*given, NONE, settings)

    threads = [threading.Thread(target=repeated, args=(given,)) for given in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    of_calls = [[x[0] for x in given[9:] if isinstance(x, tuple)][:3] for given in noted]
    for given in sets:
        assert of_calls.count([x.data_ptr() for x in given]) == 50
    assert len(of_calls) == 200


if __name__ == "__main__":
    {"triton": of_triton, "gluon": of_gluon}[sys.argv[1]]()
