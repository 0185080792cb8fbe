"""What tests of the ops share."""

from __future__ import annotations

import zlib

import pytest


@pytest.fixture(autouse=True)
def _kernels_of_emulators(request: pytest.FixtureRequest) -> None:
    """A test whose parameter `backend` is "cuda" or "gluon" has that backend's kernels.

    In the emulator each test has a schedule of its own, and `long` ones run without the checks that
    take most of the time.
    """
    parameters = getattr(request.node, "callspec", None)
    if parameters is None:
        return
    seed = zlib.crc32(request.node.name.encode())
    if parameters.params.get("backend") == "gluon":
        request.getfixturevalue("gluon_seed")(seed)
    if parameters.params.get("backend") == "cuda":
        emulator = request.getfixturevalue("emulator")
        emulator.seed(seed)
        emulator.checks(int(request.node.get_closest_marker("long") is None))
