"""`fastattn tune`: its arguments, and what it prints and writes.

The kernels run in Triton's interpreter; times come from the test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastattn.cli import main
from fastattn.ops.attention import tiles, tuning
from fastattn.ops.attention.tiles import Tile
from fastattn.ops.attention.tuning import Trial

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tiny problems, made for the interpreter"
)

PLAIN, FEATURED, CROWDED = Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2)
CPU, SEQLEN = torch.device("cpu"), 24


def test_without_a_gpu_it_is_a_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "NVIDIA GPU" in captured.err and "fastattn doctor" in captured.err


def clock(trials: Sequence[Trial], rounds: int) -> list[list[float]]:
    """One tile is faster."""
    return [[1e-3 if trial.tile == PLAIN else 2e-3] * rounds for trial in trials]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the role of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(tuning.torch, "device", lambda *name: CPU)
    row = (PLAIN, FEATURED, CROWDED)
    monkeypatch.setitem(tiles._16_BIT, (tiles.FORWARD, "hopper", 64), row)
    monkeypatch.setattr(tuning, "PREFILL", (1, 2, 1))
    monkeypatch.setattr(tuning, "interleaved", clock)


def test_it_prints_rows_and_writes_json(
    gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tuned.json"
    chosen = ["--dtype", "fp16", "--head-dim", "64", "--kernel", "forward"]
    assert main(["tune", *chosen, "--seqlen", str(SEQLEN), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.match(r"GPU a GPU, fastattn \S+, torch \S+, triton \S+\n", out)
    rows = out.split("that would change:\n")[1]
    assert eval("{" + rows + "}", vars(tiles)) == {
        (tiles.FORWARD, "hopper", 64): (PLAIN, PLAIN, CROWDED)
    }
    report = json.loads(file.read_text())
    assert report["environment"]["GPU"] == "a GPU"
    plain, featured, _ = report["entries"]
    assert plain["proposed"] is None and plain["entry"]["masking"] == tiles.PLAIN
    assert Tile(**featured["proposed"]) == Tile(32, 32, 4, 2)
    assert featured["gains"]["Tile(32, 32, 4, 2)"]["median"] == 2.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtype", "bf16,int8"], "'int8' is none of bf16, fp16, fp32"),
        (["--head-dim", "80"], "80 is none of 64, 128, 256, 512"),
        (["--kernel", "fwd"], "'fwd' is none of forward, decode, keys, queries, bias"),
    ],
)
def test_names_that_do_not_exist(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["tune", *argv])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_numbers_that_make_no_sense(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--seqlen", "0"]) == 1
    assert "seqlen must be at least 1 and budget at least 0; got 0" in capsys.readouterr().err
