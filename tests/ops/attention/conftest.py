"""The draws of the tests that draw whole problems."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of (first, count) has `--draws` problems from `--seed` on, CHUNK of its module at once."""
    if not {"first", "count"} <= set(metafunc.fixturenames):
        return
    seed, draws = (metafunc.config.getoption(name) for name in ("seed", "draws"))
    chunk = metafunc.module.CHUNK
    chunks = [(n, min(chunk, seed + draws - n)) for n in range(seed, seed + draws, chunk)]
    metafunc.parametrize(
        ("first", "count"),
        [pytest.param(*x, marks=[pytest.mark.long] * (x is not chunks[0])) for x in chunks],
    )
