"""Launches by the compiled kernel that a plan keeps hand over what Triton's own way does.

Each case runs in a process in which Triton compiles, with a driver that notes its launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def test_kept_kernels_get_the_same_arguments() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
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


if __name__ == "__main__":
    main()
