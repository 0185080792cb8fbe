"""Every kernel at every row of the tile tables that this GPU reads: the first thing to run on one.

On a CPU the same tests run, in Triton's interpreter and in the emulator of the CUDA kernels, in
float16 and at sizes that take seconds.

A run with FASTATTN_SWEEP_WRITE=FOLDER writes a digest of each case's results there, and one with
FASTATTN_SWEEP_COMPARE=FOLDER, which may use another ptxas, demands the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from fastattn.ops.common import tiles

Results = Mapping[str, torch.Tensor | None]


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[Results], None]:
    """Write down, or compare, the bits of a case's results."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16] + ".json"

    def kept(results: Results) -> None:
        found = {key: digest(x) for key, x in results.items() if x is not None}
        if folder := os.environ.get("FASTATTN_SWEEP_WRITE"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_text(json.dumps(found))
        if folder := os.environ.get("FASTATTN_SWEEP_COMPARE"):
            if not (Path(folder) / name).exists():
                pytest.skip("the first run has no results of this case")
            before = json.loads((Path(folder) / name).read_text())
            other = sorted(
                key for key in found.keys() | before if found.get(key) != before.get(key)
            )
            assert not other, f"other bits than in the first run: {', '.join(other)}"

    return kept


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tiles.Tile]:
    """The tiles of products that launchers ask for while the test runs."""
    found: list[tiles.Tile] = []
    tile = tiles.tile
    monkeypatch.setattr(tiles, "tile", lambda *a, **k: found.append(tile(*a, **k)) or found[-1])
    return found


def digest(x: torch.Tensor) -> str:
    """Of the elements' bits, in their order."""
    data = x.detach().cpu().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
