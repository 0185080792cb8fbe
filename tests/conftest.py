"""One session-wide choice: on a GPU the kernels run compiled, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
    torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist runs one worker per core

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "tests that draw whole problems (-m fuzz)")
    group.addoption("--draws", type=int, default=240, help="how many problems to draw")
    group.addoption("--seed", type=int, default=0, help="of the first one; the next is seed + 1")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def _built_emulator() -> Any:
    from emulator.knobs import Emulator

    return Emulator()


@pytest.fixture
def emulator(_built_emulator: Any) -> Iterator[Any]:
    """The kernels of the `cuda` backend: a GPU's, or those of the emulator, with its knobs."""
    with _built_emulator:
        yield _built_emulator


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    torch.manual_seed(0)
