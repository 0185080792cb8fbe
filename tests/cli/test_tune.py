"""`fastattn tune`: its arguments, and what it prints and writes.

The kernels run in Triton's interpreter; times come from the test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import backends, extension, measured, proving
from fastattn.cli import main, tune_backends
from fastattn.ops.attention import tiles, tuning
from fastattn.ops.attention.tiles import Tile
from fastattn.ops.attention.tuning import Trial
from fastattn.ops.common import gluon as kernels
from fastattn.timing import Candidate, Sample

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
    chosen = ["--only", "tiles", "--dtype", "fp16", "--head-dim", "64", "--kernel", "forward"]
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
        (["--only", "speed"], "invalid choice: 'speed'"),
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


# --- backends -------------------------------------------------------------------------------------

TIMES = {"gluon": 2.0, "cuda": 1.0, "triton": 1.5, "torch": 1.4}


@pytest.fixture
def compared(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, float]]:
    """A Hopper GPU on which nothing runs: the microseconds of the backends, to be changed."""
    times = dict(TIMES)

    def timer(candidates: Sequence[Candidate]) -> dict[str, Sample]:
        if not times:
            raise torch.OutOfMemoryError("too much")
        return {c.name: Sample((times[c.name],) * 3, 1) for c in candidates}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "devices", lambda device: ("a GPU", "sm_90"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name in ("gluon", "triton"):
        monkeypatch.setattr(backends, f"{name}_unavailable", lambda device: None)
    monkeypatch.setattr(extension, "unavailable", lambda device: None)
    monkeypatch.setattr(kernels, "unavailable", lambda device: None)
    monkeypatch.setattr(proving, "declined", lambda backend, problem, prove: None)
    monkeypatch.setattr(tune_backends, "interleaved", timer)
    small = {"attention": ((1, 8),), "norms": ((2, 8), (4, 8)), "decoding": ((1, 8),)}
    none: dict[str, Any] = dict.fromkeys(tune_backends.SIZES, ())
    monkeypatch.setattr(tune_backends, "SIZES", none | small)
    measured.of_user.cache_clear()
    yield times
    measured.of_user.cache_clear()


def rows() -> dict[tuple[str, str, bool | None], tuple[str, int, int | None]]:
    found = measured.of_user("a GPU")
    return {
        (key.op, key.backend, key.needs_grad): (row.than, row.least, row.most)
        for key, row in found.items()
    }


BACKENDS_ONLY = ["tune", "--only", "backends", "--dtype", "fp16"]


def test_the_faster_backends_are_written(
    compared: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(BACKENDS_ONLY) == 0
    out = capsys.readouterr().out
    assert "gluon 2000000.0 us, cuda 1000000.0 us, triton 1500000.0 us, torch 1400000.0 us" in out
    assert "attention, float16, with gradients: gluon before cuda: never" in out
    assert "rms_norm, float16: cuda before triton: always" in out
    never, always = (0, 0), (0, None)
    for grad in (False, True):
        assert rows()["attention", "gluon", grad] == ("cuda", *never)
        assert rows()["attention", "cuda", grad] == ("triton", *always)
        assert rows()["attention", "triton", grad] == ("torch", *never)
    assert rows()["attention_with_kv_cache", "cuda", False] == ("triton", *always)
    assert rows()["layer_norm", "cuda", None] == ("triton", *always)
    assert {key.dtype for key in measured.of_user("a GPU")} == {"float16"}


def test_what_is_measured_again_replaces_what_was(compared: dict[str, float]) -> None:
    assert main(BACKENDS_ONLY) == 0
    first = rows()
    compared.update(cuda=9.0)
    assert main([*BACKENDS_ONLY[:-1], "fp16,fp32"]) == 0
    assert rows()["attention", "cuda", True] == ("triton", 0, 0)
    assert rows().keys() == first.keys()
    assert {key.dtype for key in measured.of_user("a GPU")} == {"float16", "float32"}


def test_noise_leaves_the_default_order(compared: dict[str, float]) -> None:
    """On a Hopper chip gluon, then triton; cuda only where it is faster for sure."""
    compared.update(gluon=1.01, cuda=1.0, triton=1.01, torch=1.0)
    assert main(BACKENDS_ONLY) == 0
    assert rows()["attention", "gluon", True] == ("cuda", 0, None)
    assert rows()["attention", "triton", True] == ("torch", 0, None)
    assert rows()["attention", "cuda", True] == ("triton", 0, 0)


def test_a_call_that_cannot_run_is_left_out(
    compared: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    compared.clear()
    assert main(BACKENDS_ONLY) == 0
    out = capsys.readouterr().out
    assert "left out, too much" in out and "no kernel could be compared" in out
    assert rows() == {}


def test_a_kernel_that_failed_its_proof_is_not_timed(
    compared: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def declined(backend: str, problem: Any, prove: bool) -> str | None:
        return "its proof failed" if backend == "cuda" else None

    monkeypatch.setattr(proving, "declined", declined)
    del compared["cuda"]
    assert main(BACKENDS_ONLY) == 0
    assert rows()["layer_norm", "triton", None] == ("torch", 0, 0)
    assert all(backend != "cuda" for _, backend, _ in rows())


def test_the_calls_are_of_the_sizes_of_the_table(compared: dict[str, float]) -> None:
    """Each has a size, so that a row can be about it, and on a CPU it runs with its backward."""
    monkey = {"attention": (1, 8), "ffn": (3, 8, 16), "losses": (3, 8, 5), "rotary": (1, 3)}
    tune_backends.SIZES.update({name: (sizes,) for name, sizes in monkey.items()})
    for grad in (False, True):
        ops = set()
        for function, args, kwargs in tune_backends.calls(torch.float32, CPU, grad):
            problem, _ = backends.problem_of(function, *args, **kwargs)
            ops.add(problem.op)
            assert problem.elements is not None and problem.needs_grad in (grad, None)
            tune_backends._run(function, args, kwargs, "reference")()
        assert ops == proving._proofs.keys() - (
            {"attention_with_kv_cache"} if grad else {"layer_norm", "rms_norm"}
        )
