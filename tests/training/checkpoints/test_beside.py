"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training.small import model, same, stopping, trained, weights, with_changes

from fastattn.training import Checkpoints, History
from fastattn.training.checkpoints import tensors
from fastattn.training.checkpoints.beside import Beside

pytest.importorskip("safetensors")
CONFIG = with_changes(steps=6, evaluation_interval=100, ema_decay=0.8)
SECONDS = 30.0  # after which something that should happen has not


@pytest.fixture
def at_write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Any], None]]:
    """`at_write(number, action)`: `action` comes before that write of tensors, counted from 0."""
    actions: dict[int, Callable[[], None]] = {}
    real, count = tensors.write, 0

    def write(*arguments: Any) -> None:
        nonlocal count
        count += 1
        actions.get(count - 1, lambda: None)()
        real(*arguments)

    monkeypatch.setattr(tensors, "write", write)
    yield actions.__setitem__


def _run(folder: Path, on_step: Callable[[int], None] = lambda _: None, **how: Any) -> Any:
    """A run with dropout and a checkpoint every two steps; its record and weights."""
    subject = model(dropout=0.1)
    history = trained(
        subject, CONFIG, validation=None,
        checkpoints=Checkpoints(folder, every_steps=2, keep=9, **how),
        on_progress=lambda history: on_step(len(history.steps)),
    )  # fmt: skip
    return history, weights(subject)


def _content(folder: Path) -> dict[str, Any]:
    """The tensors in the files of all checkpoints."""
    files = folder.glob("step-*/**/*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(
    tmp_path: Path, at_write: Callable[[int, Any], None]
) -> None:
    """Step 3 ends before the weights of step 2 are written; the files are those of step 2."""
    expected = _run(tmp_path / "one by one", asynchronous=False)
    further, waited = threading.Event(), []
    # The first run has written four times, and this one writes step 0 before.
    at_write(5, lambda: waited.append(further.wait(SECONDS)))

    history, got = _run(tmp_path / "beside", lambda step: further.set() if step == 3 else None)
    assert waited == [True]
    assert history == expected[0] and same(got, expected[1])
    files = _content(tmp_path / "beside")
    assert len(files) == 8 and files == _content(tmp_path / "one by one")


def test_one_is_written_at_a_time_and_all_are_there_at_the_end(
    tmp_path: Path, at_write: Callable[[int, Any], None]
) -> None:
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        # Step 4 has its checkpoint when this one is over; so the run cannot come to its sixth step.
        assert not ended.wait(0.3)

    ended = threading.Event()
    at_write(1, slow)
    _run(tmp_path, lambda step: ended.set() if step == 5 else None)
    assert begun.is_set() and Checkpoints(tmp_path).steps() == [0, 2, 4, 6]


@pytest.mark.parametrize(("number", "failed", "last"), [(1, 2, 0), (3, 6, 4)])
def test_an_error_is_raised_in_the_next_step_or_at_the_end(
    number: int, failed: int, last: int, tmp_path: Path, at_write: Callable[[int, Any], None]
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_write(number, full)
    subject, steps = model(dropout=0.1), []
    checkpoints = Checkpoints(tmp_path, every_steps=2, keep=9)

    def progress(history: History) -> None:
        steps.append(len(history.steps))
        assert checkpoints.last is not None or steps[-1] == 0  # waits for what is being written

    with pytest.raises(OSError, match=rf"step {failed} could not be written .*step-00000{last}\."):
        trained(subject, CONFIG, validation=None, checkpoints=checkpoints, on_progress=progress)
    assert steps[-1] == min(failed + 1, 6) and Checkpoints(tmp_path).steps()[-1] == last
    history, got = _run(tmp_path)  # with room again
    expected = _run(tmp_path / "whole")
    assert history == expected[0] and same(got, expected[1])


def test_ctrl_c_waits_for_the_checkpoint(tmp_path: Path) -> None:
    """The one that is being written, and that of the step at which the run ends."""
    checkpoints = Checkpoints(tmp_path, every_steps=2, keep=9)
    history = trained(model(), CONFIG, checkpoints=checkpoints, on_progress=stopping(3))
    assert history.interrupted and Checkpoints(tmp_path).steps() == [0, 2, 3]
    state = json.loads((tmp_path / "step-000003" / "state.json").read_text())
    assert state["step"] == 3


def test_an_error_of_the_work_is_raised_once() -> None:
    beside, moment = Beside(), threading.Event()
    beside.start(lambda: (moment.wait(SECONDS), 1 / 0)[1])
    beside.join(0.01)
    assert not beside.failed
    moment.set()
    with pytest.raises(ZeroDivisionError):
        beside.wait()
    beside.wait()
