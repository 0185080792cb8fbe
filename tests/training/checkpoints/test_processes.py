"""Checkpoints of several processes: the same bits, other numbers of them, and ones that are lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from training.checkpoints import tasks
from training.small import same

import fastattn
from fastattn.training import Checkpoints

safetensors = pytest.importorskip("safetensors.torch")
ROOT = Path(__file__).parents[3]
Runs = tuple[Path, dict[str, tasks.Result]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    tasks.run(folder / "alone", {}, 5)
    results = processes.run(2, tasks.two, folder)[0]
    results["one"] = tasks.run(folder / "one", {})
    results["joined"] = tasks.run(folder / "joined", {}, dropout=0.0)
    return folder, results


@pytest.mark.parametrize(("name", "start"), [("again", 4), ("damaged", 2)])
def test_as_many_processes_go_on_to_the_same_bits(name: str, start: int, runs: Runs) -> None:
    """Sharded weights, with an averaged copy and dropout; also past a checkpoint with a hole."""
    _, results = runs
    got, whole = results[name], results["whole"]
    assert got.start == start and len(whole.history.steps) == 6
    assert got.history == whole.history and same(got.weights, whole.weights)


def test_a_missing_shard_is_named(runs: Runs) -> None:
    folder, results = runs
    (told,) = results["damaged"].warned
    assert told.startswith(f"passing over the checkpoint {folder}/damaged/step-000004: shard-00002")
    assert "is missing. It is damaged-step-000004 now" in told
    assert results["again"].warned == []


@pytest.mark.parametrize("name", ["copies", "one", "alone"])
def test_other_numbers_of_processes_go_on(name: str, runs: Runs) -> None:
    """Saved by two that share the weights, or by one; the first steps are the same bits."""
    _, results = runs
    _assert_gone_on(results[name], results["whole"], first=0 if name == "alone" else 4)


def test_divided_matrices_go_on_divided_or_whole(runs: Runs) -> None:
    """By tensor parallelism, which has rows of q, k and v in an order of its own."""
    folder, results = runs
    whole, again = results["divided"], results["divided again"]
    assert again.start == 4 and again.history == whole.history
    assert same(again.weights, whole.weights)
    for name in ("joined", "divided otherwise"):
        _assert_gone_on(results[name], whole, first=4)
    model = fastattn.models.load(folder / "divided whole" / "step-000006" / "model")
    assert same(model.state_dict(), whole.weights)


def _assert_gone_on(got: tasks.Result, whole: tasks.Result, first: int) -> None:
    assert got.start == 4 and got.history.steps[:first] == whole.history.steps[:first]
    for ours, theirs in zip(got.history.steps, whole.history.steps, strict=True):
        assert ours.tokens == theirs.tokens and abs(ours.loss - theirs.loss) <= 1e-6
    for name, weight in got.weights.items():
        assert (weight - whole.weights[name]).abs().max() <= 1e-5


def test_a_checkpoint_has_whole_weights_to_load_and_no_pickle(runs: Runs) -> None:
    folder, results = runs
    last = folder / "whole" / "step-000006"
    assert same(fastattn.models.load(last / "model").state_dict(), results["whole"].weights)
    suffixes = {path.suffix for path in last.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert len(list(last.glob("*.safetensors"))) == 2


def test_a_process_that_cannot_write_is_an_error_on_each(tmp_path: Path) -> None:
    """In the next step or the one after it, with the number of the checkpoint."""
    for error in processes.run(2, tasks.unwritten, tmp_path):
        assert error.startswith("the checkpoint of step 2 could not be written to")
        assert f"No space left on device); the last good one is {tmp_path}/step-000000." in error
    assert Checkpoints(tmp_path).steps() == [0] and not list(tmp_path.glob(".unfinished*"))


def test_a_process_lost_in_a_save_loses_nothing(tmp_path: Path, runs: Runs) -> None:
    start = time.monotonic()
    with pytest.raises(processes.Failed, match="died with exit code -9") as failed:
        processes.run(2, tasks.lost, tmp_path)
    assert time.monotonic() - start < 60
    assert "LostProcessError: another process of this run has ended" in str(failed.value)
    assert Checkpoints(tmp_path).steps() == [0]
    got = processes.run(2, tasks.one, tmp_path, tasks.SHARDED)[1]
    assert same(got.weights, runs[1]["whole"].weights)


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    lead, other = processes.run(2, tasks.apart, tmp_path)
    assert "is not the same folder for all processes: give one on a file system" in other
    assert lead.startswith("rank 1 of 2: ") and other in lead


@pytest.mark.long
@pytest.mark.parametrize("numbers", [{"shard": 4}, {"replicate": 2, "shard": 2}])
def test_four_processes_saved_and_any_number_goes_on(
    numbers: dict[str, int], tmp_path: Path
) -> None:
    whole = processes.run(4, tasks.one, tmp_path / "whole", numbers, None, 8)[0]
    processes.run(4, tasks.one, tmp_path / "parted", numbers, 5, 8)
    for count, layout in ((1, {}), (2, {"shard": 2}), (8, {"shard": 8}), (4, numbers)):
        copy = tmp_path / str(count)
        shutil.copytree(tmp_path / "parted", copy)
        got = processes.run(count, tasks.one, copy, layout, None, 8)[0]
        _assert_gone_on(got, whole, first=4)
        if count == 4:
            assert got.history == whole.history and same(got.weights, whole.weights)


@pytest.mark.long
def test_torchrun_restarts_from_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A worker is killed by SIGKILL in a step, then one in a save; the bits are the same."""
    whole = processes.run(2, tasks.one, tmp_path / "whole", tasks.SHARDED)[0]
    script = Path(__file__).with_name("elastic.py")
    folder = tmp_path / "elastic"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", "2", str(script), str(folder), "step", "save"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(exitcode: -9)") == 2 and "LostProcessError" in done.stderr
    assert same(safetensors.load_file(folder / "final.safetensors"), whole.weights)
    assert Checkpoints(folder).steps() == [5, 6]
