"""Triton's kernels as Triton compiles them, run without a GPU: the session behind `--triton ir`.

The package ttsem executes each launch's TTIR, made by Triton's own front end for sm_90, on the CPU
tensors of the launch. A launch fails at the kernel's line if it touches memory outside of its
tensors, if two programs meet on an element that one of them writes, or if a value is undefined.
docs/kernels.md says what this does not see.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from unittest import mock

import torch

from fastattn.backends import TRITON_ON_CPU

# ttsem executes the IR of one Triton, and `session` below uses names of its that are not public.
TRITON, TTSEM = "3.8.", "0.1.0"
INSTALL = f"pip install --ignore-requires-python --no-deps ttsem=={TTSEM}"


def unavailable() -> str | None:
    """The reason why no kernel can be executed this way here, or None."""
    if sys.version_info < (3, 11):
        return f"ttsem needs Python 3.11, this is {sys.version.split()[0]}"
    for package, wanted, fix in (
        ("triton", TRITON, f"pip install triton=={TRITON}0"),
        ("ttsem", TTSEM, INSTALL),
    ):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed: {fix}"
        if not version.startswith(wanted):
            return f"executing Triton's IR takes {package} {wanted.rstrip('.')}, this is {version}: {fix}"
    return None


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Launches are executed by ttsem, and memory that nobody wrote holds NaN."""
    from ttsem import _fakedriver, harness, mlir, sanitize

    texts: dict[Any, str] = {}

    def ttir(record: Any, stage: str, target: Any) -> str:
        """Compiled once in a process, and no further: LLVM and ptxas would take most of the time."""
        key = record.fn, repr(harness._specialize(record.fn, record.args, record.kwargs, target))
        if key not in texts:
            texts[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return texts[key]

    def unchecked() -> None:
        raise AssertionError("the launch is too large to be checked for races: make it smaller")

    mlir.enable_generic_printing()
    with (
        mock.patch.dict(os.environ, {TRITON_ON_CPU: "1"}),
        mock.patch.object(harness, "ir_for_launch", ttir),
        mock.patch.object(mlir, "parse", functools.cache(mlir.parse)),
        sanitize.session(cuda_is_cpu=False, on_unchecked=unchecked),
    ):
        os.environ.pop("TRITON_INTERPRET", None)
        _fakedriver.unstub_torch_cuda()  # there is no GPU, whatever Triton believes
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
        yield
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":  # fails, with the reason, where no kernel can be executed
    sys.exit(unavailable())
