"""A process that does not live is missed within the limit, and one that lives is not, however slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import processes
import pytest
from training.distributed import hearts

from fastattn.training.distributed.layout import DistributedConfig

SCENARIOS = (
    "rank 0 stops", "rank 1 stops", "rank 0 leaves", "rank 1 leaves", "computes",
    "keeps Python's lock", "is patient",
)  # fmt: skip
SECONDS = 25


class Ended(NamedTuple):
    """A process: its exit code, -9 where it had to be killed, and what it said."""

    code: int | None
    said: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """The two processes of each scenario, all run at once."""
    folder: Path = tmp_path_factory.mktemp("said")
    started = {}
    for scenario in SCENARIOS:
        port = processes.free_port()
        files = [folder / f"{scenario} {rank}" for rank in range(2)]
        started[scenario] = [
            (processes.start(hearts.run, rank, port, scenario, file), file)
            for rank, file in enumerate(files)
        ]
    end = time.monotonic() + SECONDS
    found: dict[str, list[Ended]] = {scenario: [] for scenario in SCENARIOS}
    for scenario, pair in started.items():
        for rank, (process, file) in enumerate(pair):
            if scenario == f"rank {rank} stops":
                pair[1 - rank][0].join(max(0.1, end - time.monotonic()))
            else:
                process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            found[scenario].append(Ended(process.exitcode, file.read_text()))
    return found


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named(ended: dict[str, list[Ended]]) -> None:
    waiting, stopped = ended["rank 1 stops"]
    assert waiting.code == 1 and stopped.code == -9
    assert "rank 0: rank 1 of 2 has given no sign of life for 3 s" in waiting.said
    assert "goes on from the last checkpoint" in waiting.said


@pytest.mark.long
def test_the_keeper_of_the_store_is_stopped(ended: dict[str, list[Ended]]) -> None:
    stopped, waiting = ended["rank 0 stops"]
    assert waiting.code == 1 and stopped.code == -9
    assert "the process that keeps the run's store (rank 0, or torchrun's agent)" in waiting.said


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["computes", "rank 1 leaves", "is patient"])
def test_a_rank_that_lives_is_waited_for(scenario: str, ended: dict[str, list[Ended]]) -> None:
    assert ended[scenario] == [Ended(0, ""), Ended(0, "")]


@pytest.mark.long
def test_the_keeper_of_the_store_leaves(ended: dict[str, list[Ended]]) -> None:
    """The other has to do something yet: torch may say that the store is gone."""
    assert [one.code for one in ended["rank 0 leaves"]] == [0, 0]
    assert "sign of life" not in ended["rank 0 leaves"][1].said


@pytest.mark.long
def test_pythons_lock_is_a_sign_of_nothing(ended: dict[str, list[Ended]]) -> None:
    """It is as if the process were stopped: therefore `patient`."""
    assert "rank 1 of 2 has given no sign of life" in ended["keeps Python's lock"][0].said


@pytest.mark.parametrize("name", ["lost_seconds", "step_minutes"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        DistributedConfig(**{name: value})
