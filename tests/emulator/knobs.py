"""The `cuda` backend's kernels for a test: a GPU's own, or the emulator's with its knobs."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from emulator import library

from fastattn import extension


def asked() -> bool:
    """Whether the extension was asked for: by the variable that setup.py builds for."""
    return os.environ.get("FASTATTN_CUDA_ARCHS", "").strip() != ""


def not_here(reason: str) -> NoReturn:
    """Skip a test of the `cuda` backend; it fails where the extension was asked for."""
    if asked():
        pytest.fail(f"FASTATTN_CUDA_ARCHS asks for the extension: {reason}")
    pytest.skip(reason)


@functools.cache
def _loaded() -> extension.Library | None:
    library.load()
    return extension._emulator


class Emulator:
    """On a GPU the knobs turn nothing, and nothing is counted.

    The `cuda` backend runs on the CPU only within `with emulator:`; other tests have none.
    """

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        if torch.cuda.is_available():
            if (reason := extension.unavailable(torch.device("cuda", 0))) is not None:
                not_here(reason)
            return
        _loaded()
        extension._emulator = None
        self._library = ctypes.CDLL(str(library.build()))
        self._library.fastattn_emulator_counts_json.restype = ctypes.c_char_p

    def __enter__(self) -> Any:
        if self._library is not None:
            extension._emulator = _loaded()
        self.seed(0)
        self.checks(1)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._library is not None:
            extension._emulator = None

    def seed(self, seed: int) -> None:
        """Of the scheduler that orders blocks, warps and threads."""
        if self._library is not None:
            self._library.fastattn_emulator_set_seed(ctypes.c_uint64(seed))

    def checks(self, level: int) -> None:
        """0: what a kernel writes and where; 1: races, uninitialised memory, banks and all else."""
        if self._library is not None:
            self._library.fastattn_emulator_check_level(level)

    def counts(self, function: Callable[[], object]) -> dict[str, dict[str, int]] | None:
        """Of each kernel while `function` runs; None on a GPU."""
        if self._library is None:
            function()
            return None
        self._library.fastattn_emulator_reset_counts()
        function()
        counts: dict[str, dict[str, int]] = json.loads(
            self._library.fastattn_emulator_counts_json()
        )
        return {kernel: of for kernel, of in counts.items() if of["launches"]}
