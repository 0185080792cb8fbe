"""The emulator, or the GPU where there is one, agrees with digests.json on every primitive."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conformance import conformance
from emulator.knobs import not_here


@pytest.fixture(scope="module")
def found(device: str) -> dict[str, str]:
    if device == "cuda" and conformance.build.find_nvcc() is None:
        not_here("nvcc was not found: nothing to run on the GPU")
    conformance.load(device)
    return conformance.run(device)


@pytest.mark.parametrize("name", conformance.PROGRAMS)
def test_digests(name: str, found: dict[str, str]) -> None:
    assert found[name] == json.loads(conformance.DIGESTS.read_text())[name]


def test_the_table_has_every_program() -> None:
    assert list(json.loads(conformance.DIGESTS.read_text())) == list(conformance.PROGRAMS)


def test_what_is_inexact_is_named() -> None:
    program = conformance.PROGRAMS["math"]
    x = program.draw(np.random.default_rng(0))
    exact = [
        function(x.view(np.float32).astype(np.float64))
        for function, _, _ in conformance.ERRORS.values()
    ]
    out = conformance.bits(np.concatenate(exact))
    assert all(conformance.verdicts(x, out).values())
    out[:10] += 100  # of exp2_fast, in the last place
    wrong = [name for name, right in conformance.verdicts(x, out).items() if not right]
    assert wrong == ["exp2_fast"]
