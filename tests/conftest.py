"""One session-wide choice: what runs the Triton kernels.

On a GPU they run compiled; without one, Triton's IR is executed where ttsem is (ir.py), and Triton's
interpreter runs them elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import interpreter
import ir
import pytest
import torch

from fastattn.backends import triton_runs

if not torch.cuda.is_available():
    torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist runs one worker per core


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "tests that draw whole problems (-m fuzz)")
    group.addoption("--draws", type=int, default=240, help="how many problems to draw")
    group.addoption("--seed", type=int, default=0, help="of the first one; the next is seed + 1")
    parser.getgroup("triton", "Triton kernels without a GPU").addoption(
        "--triton",
        choices=("ir", "interpreter"),
        help="execute their IR, or interpret their Python; by default the first where ttsem is",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before Triton is first imported, which settles it; in every process of pytest-xdist."""
    if torch.cuda.is_available():
        return
    reason = ir.unavailable()
    chosen = config.getoption("--triton") or ("interpreter" if reason else "ir")
    if chosen == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.hasten()
    elif reason is not None:
        raise pytest.UsageError(f"--triton ir: {reason}")
    else:
        session = contextlib.ExitStack()
        session.enter_context(ir.session())
        config.add_cleanup(session.close)


def pytest_report_header() -> str | None:
    return None if torch.cuda.is_available() else f"triton: kernels are {triton_runs()}"


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


@pytest.fixture
def gluon_seed() -> Iterator[Callable[[int], None]]:
    """The kernels of the `gluon` backend: a Hopper GPU's, or those in the emulator of tests/gluon.

    Returns a function that sets the seed of the emulator's schedule.
    """
    from fastattn.ops.common import gluon as kernels

    if torch.cuda.is_available():
        if (reason := kernels.unavailable(torch.device("cuda", 0))) is not None:
            pytest.skip(reason)
        yield lambda seed: None
        return
    from gluon.launching import launch

    schedule = {"seed": 0}
    kernels.use(lambda *args, **constants: launch(*args, **schedule, **constants))
    yield lambda seed: schedule.update(seed=seed)
    kernels.use(None)


@pytest.fixture
def any_order() -> Iterator[None]:
    """Torch does not ask for equal bits: executed IR does (ir.py), for the NaN in new memory."""
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(asked, warn_only=True)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    torch.manual_seed(0)
