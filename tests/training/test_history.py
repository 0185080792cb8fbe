"""The record of a run: as JSON, as lines while it grows, for TensorBoard, as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastattn.training import Evaluation, History, JsonLines, Step, TensorBoard


def _growing(steps: int, skipped: int = 2) -> list[History]:
    """The record at each call of a run: before, after each step, after the validation of step 2.

    The gradient of step `skipped` overflowed.
    """
    history, seen = History(), []

    def call() -> None:
        seen.append(History.from_dict(history.as_dict()))

    history.evaluations.append(Evaluation(0, 3.0, {"accuracy": 0.1}))
    call()
    for step in range(1, steps + 1):
        norm = math.inf if step == skipped else 1.0
        history.add(Step(step, 3.0 - step / 10, 0.1, norm, tokens=8, seconds=0.5))
        call()
        if step == 2:
            history.evaluations.append(Evaluation(2, 2.5, {"accuracy": 0.2}))
            call()
    return seen


def test_a_record_is_saved_as_json_that_any_reader_takes_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite norm too, for which JSON has no number; and seconds, which `==` leaves out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    history = _growing(3)[-1]
    assert json.dumps(history.as_dict(), allow_nan=False)
    history.save("~/history.json")
    again = History.load("~/history.json")
    assert again == history and again.training_seconds == history.training_seconds == 1.5
    assert [step.gradient_norm for step in again.steps] == [1.0, math.inf, 1.0]
    assert [step.seconds for step in again.steps] == [0.5] * 3
    history.plot("~/loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    History().plot("~/empty.png")  # interrupted before the first step
    names = sorted(path.name for path in tmp_path.glob("[!.]*"))
    assert names == ["empty.png", "history.json", "loss.png"]
    with pytest.raises(ValueError, match="path is an empty path"):
        History.load("")


def test_the_best_is_the_first_of_the_lowest_and_a_number() -> None:
    assert History().best is None
    losses = [math.nan, 3.0, 2.0, 2.0, math.nan, 2.5]
    history = History(evaluations=[Evaluation(i, loss) for i, loss in enumerate(losses)])
    assert history.best == Evaluation(2, 2.0)
    assert History(evaluations=[Evaluation(0, math.nan)]).best is None


def test_lines_are_those_of_the_record_also_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    calls = _growing(4)
    metrics = JsonLines(path)
    for history in calls[:-1]:
        metrics(history)
    with open(path, "a") as file:
        file.write('{"kind": "step", "st')  # killed in the middle of a line
    again = JsonLines(path)  # which goes on from the validation of step 2
    for history in calls[3:]:
        again(history)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    places = [(line["kind"], line["step"]) for line in lines]
    assert places == [
        ("evaluation", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("step", 4),
    ]  # fmt: skip
    assert lines[2] == {
        "kind": "step", "step": 2, "loss": 2.8, "learning_rate": 0.1, "gradient_norm": None,
        "tokens": 8, "seconds": 0.5,
    }  # fmt: skip
    assert lines[3] == {"kind": "evaluation", "step": 2, "loss": 2.5, "scores": {"accuracy": 0.2}}


def test_tensorboard_reads_each_step_once_also_after_a_crash(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    calls = _growing(4)
    for part in (calls, calls[3:]):
        board = TensorBoard(tmp_path)
        for history in part:
            board(history)
        board.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("loss/training")] == [1, 2, 3, 4]
    assert [event.value for event in read.Scalars("loss/validation")] == [3.0, 2.5]
    assert [event.step for event in read.Scalars("validation/accuracy")] == [0, 2]
    assert {event.value for event in read.Scalars("tokens_per_second")} == {16.0}
