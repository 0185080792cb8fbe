"""The search for tiles: what it skips, when it proposes, and its words.

The kernels run in Triton's interpreter; times come from the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fastattn.ops.attention import tiles, tuning
from fastattn.ops.attention.tiles import Tile
from fastattn.ops.attention.tuning import Entry, Gain, Outcome, Trial
from fastattn.ops.common import launch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tiny problems, made for the interpreter"
)

PLAIN, FEATURED, CROWDED = Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2)
CPU, SEQLEN = torch.device("cpu"), 24
FORWARD = Entry(tiles.FORWARD, "fp16", 64, tiles.PLAIN, 90)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    row = (PLAIN, FEATURED, CROWDED)
    monkeypatch.setitem(tiles._16_BIT, (tiles.FORWARD, "hopper", 64), row)
    monkeypatch.setattr(tuning, "PREFILL", (1, 2, 1))
    monkeypatch.setattr(tuning, "DECODE", (1, 4, 1))


def timer(seconds: Callable[[Tile], float], noise: float = 0.0) -> tuning.Timer:
    """A clock by tile; every other round of a list's first trial is `noise` slower."""

    def time(trials: Sequence[Trial], rounds: int) -> list[list[float]]:
        times = [[seconds(trial.tile)] * rounds for trial in trials]
        times[0] = [t * (1 + noise * (n % 2)) for n, t in enumerate(times[0])]
        return times

    return time


def flat(tile: Tile) -> float:
    return 1e-3


def tuned(clock: tuning.Timer, entry: Entry = FORWARD, budget: float = 60.0) -> Outcome:
    (outcome,) = tuning.tune([entry], CPU, SEQLEN, budget, clock)
    return outcome


# --- the search space -----------------------------------------------------------------------------


def test_neighbours_are_one_step_away() -> None:
    assert set(tuning.neighbours(Tile(64, 32, 4, 2), tiles.FORWARD)) == {
        Tile(32, 32, 4, 2), Tile(128, 32, 4, 2), Tile(64, 16, 4, 2), Tile(64, 64, 4, 2),
        Tile(64, 32, 2, 2), Tile(64, 32, 8, 2), Tile(64, 32, 4, 1), Tile(64, 32, 4, 3),
        Tile(128, 16, 4, 2), Tile(32, 64, 4, 2),
    }  # fmt: skip


def test_neighbours_keep_what_the_kernels_take() -> None:
    for kernel in tuning.KERNELS:
        corners = (Tile(16, 16, 2, 1), Tile(128, 128, 8, 5), Tile(16, 128, 8, 1))
        for tile in corners if kernel != tiles.DECODE else (Tile(16, 64, 4, 3),):
            near = list(tuning.neighbours(tile, kernel))
            assert near and tile not in near
            for x in near:
                assert 16 <= x.block_m <= 128 and 16 <= x.block_n <= tiles.MAX_BLOCK_N
                assert x.warps in (2, 4, 8) and 1 <= x.stages <= 5
                assert kernel != tiles.DECODE or x.block_m == 16


@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
def test_every_row_that_the_gpu_reads_is_an_entry_once(architecture: int) -> None:
    entries = tuning.entries_of(
        architecture, list(tuning.KERNELS), list(tuning.DTYPES), tuning.HEAD_DIMS,
        tiles.MASKINGS,
    )  # fmt: skip
    assert len(entries) == len(set(entries))
    read = {
        tiles.row(kernel, architecture, size, width)
        for kernel in tuning.KERNELS
        for size in (2, 4)
        for width in range(1, 513)
    }
    assert {entry.row for entry in entries} == read
    places = [(entry.row, entry.dtype, entry.masking) for entry in entries]
    assert len(places) == len(set(places))
    assert (tiles.BIAS, tiles.PLAIN) not in {(entry.kernel, entry.masking) for entry in entries}
    for entry in entries:
        assert entry.tile() in (tiles._16_BIT | tiles._32_BIT)[entry.row]  # type: ignore[operator]


def test_the_search_walks_on_from_what_is_faster() -> None:
    """Time falls with block_n up to 128 and with stages up to 4: five steps from the table's."""
    best = Tile(32, 128, 4, 4)

    def seconds(tile: Tile) -> float:
        away = sum(
            abs(getattr(tile, name).bit_length() - getattr(best, name).bit_length())
            for name in ("block_m", "block_n", "warps")
        )
        return 1e-3 * 1.2 ** (away + abs(tile.stages - best.stages))

    outcome = tuned(timer(seconds))
    assert outcome.proposed == best and outcome.finished
    assert outcome.present == PLAIN and outcome.seconds == pytest.approx(seconds(PLAIN))
    assert outcome.proposed_gain is not None
    assert outcome.proposed_gain.median == pytest.approx(1.2**4)


def test_the_budget_ends_the_search() -> None:
    outcome = tuned(timer(flat), budget=0.0)
    assert not outcome.finished and not outcome.gains and outcome.proposed is None
    assert "the budget ended the search" in "\n".join(tuning.described(outcome))


# --- every kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("kernel", "masking"),
    [(x, y) for x in tuning.KERNELS for y in tiles.MASKINGS if (x, y) != (tiles.BIAS, tiles.PLAIN)],
)
def test_it_launches_the_kernel_of_the_entry(kernel: str, masking: str, dtype: str) -> None:
    entry = Entry(kernel, dtype, 64, masking, 90)
    call = tuning.problem(entry, SEQLEN, CPU)
    with launch.recorded() as launches:
        present = call()
    assert all(result.abs().sum() > 0 for result in present)
    tile = Tile(16, 32, 2, 1)
    trial = tuning.attempt(entry, tile, call, present)
    assert isinstance(trial, Trial), trial
    constants = trial.launch.constants
    assert trial.launch.kernel.fn.__name__ == tuning.KERNELS[kernel]
    assert Tile(*(constants[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))) == tile
    table = next(x for x in launches if x.kernel is trial.launch.kernel).constants
    assert table["BLOCK_M"] == entry.tile().block_m and table["BLOCK_N"] == entry.tile().block_n
    if kernel != tiles.BIAS:  # whose result is reduced and rounded by torch
        for result in trial.results:
            result.fill_(torch.nan)
        trial.launch.run()
        assert not any(result.isnan().any() for result in trial.results)


# --- what is skipped ------------------------------------------------------------------------------


def faulty(
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[dict[str, Any]], bool],
    fault: Callable[..., Any],
) -> None:
    """Launches whose constants are `wrong` are followed by `fault`."""
    real = launch.launch

    def launched(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        real(kernel, grid, *args, **constants)
        if wrong(constants):
            fault(args)

    monkeypatch.setattr(launch, "launch", launched)


def test_what_cannot_run_is_skipped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_resources(args: Any) -> None:
        raise RuntimeError("out of resource: shared memory,\nRequired: 300000")

    faulty(monkeypatch, lambda constants: constants["BLOCK_N"] == 64, out_of_resources)
    outcome = tuned(timer(lambda tile: 1e-3 / tile.block_n))
    reason = "RuntimeError: out of resource: shared memory, Required: 300000"
    assert outcome.skipped == {"Tile(32, 64, 4, 2)": reason, "Tile(16, 64, 4, 2)": reason}
    assert outcome.proposed is None
    assert f"  Tile(32, 64, 4, 2)  skipped: {reason}" in tuning.described(outcome)


def test_what_computes_something_else_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(
        monkeypatch, lambda constants: constants["num_stages"] == 3, lambda args: args[3].add_(0.1)
    )
    outcome = tuned(timer(lambda tile: 1e-3 / tile.stages))
    assert list(outcome.skipped) == ["Tile(32, 32, 4, 3)"]
    assert outcome.skipped["Tile(32, 32, 4, 3)"].startswith("its result differs by 1.0")
    assert outcome.proposed is None and "Tile(32, 32, 4, 1)" in outcome.gains


def test_nan_in_a_result_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(
        monkeypatch,
        lambda constants: constants["num_stages"] == 3,
        lambda args: args[3][0, 0, 0, 0].fill_(torch.nan),
    )
    assert list(tuned(timer(flat)).skipped) == ["Tile(32, 32, 4, 3)"]


def test_a_present_tile_that_cannot_run_ends_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: Any) -> None:
        raise RuntimeError("no kernel image")

    faulty(monkeypatch, lambda constants: True, broken)
    outcome = tuned(timer(flat))
    assert outcome.skipped == {"Tile(32, 32, 4, 2)": "RuntimeError: no kernel image"}
    assert outcome.proposed is None


# --- when it proposes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "noise", "proposed"),
    [
        (1.10, 0.0, True),
        (1.01, 0.0, False),  # below the least gain
        (0.9, 0.0, False),
        (1.10, 0.3, False),  # the present tile differs from itself by more
    ],
)
def test_a_change_is_beyond_the_spread(gain: float, noise: float, proposed: bool) -> None:
    faster = Tile(64, 32, 4, 2)
    outcome = tuned(timer(lambda tile: 1e-3 / gain if tile == faster else 1e-3, noise))
    assert (outcome.proposed == faster) is proposed
    assert outcome.gains["Tile(64, 32, 4, 2)"].p20 == pytest.approx(gain)


def test_a_gain_that_does_not_repeat_is_not_proposed() -> None:
    runs: list[int] = []

    def time(trials: Sequence[Trial], rounds: int) -> list[list[float]]:
        runs.append(rounds)
        lucky = rounds == tuning.ROUNDS
        return [[5e-4 if trial.tile.stages == 1 and lucky else 1e-3] * rounds for trial in trials]

    outcome = tuned(time)
    assert runs[-1] == tuning.CONFIRMING_ROUNDS
    assert outcome.gains["Tile(32, 32, 4, 1)"].median == 2.0 and outcome.proposed is None


def test_gain_is_of_the_rounds() -> None:
    gain = Gain.of([2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert (gain.median, gain.p20, gain.p80) == (7.0, 4.0, 10.0)


# --- what is printed ------------------------------------------------------------------------------


def outcome_of(dtype: str, proposed: Tile | None, masking: str = tiles.PLAIN) -> Outcome:
    entry = Entry(tiles.FORWARD, dtype, 64, masking, 90)
    gain = None if proposed is None else Gain(1.25, 1.2, 1.3)
    return Outcome(entry, entry.tile(), 1e-3, proposed=proposed, proposed_gain=gain, noise=gain)


def parsed(lines: Sequence[str]) -> dict[Any, tuple[Tile, ...]]:
    """The printed rows as the table would read them."""
    return eval("{" + "\n".join(lines) + "\n}", vars(tiles))


def test_the_lines_are_rows_of_the_table() -> None:
    plain, featured = Tile(128, 16, 8, 3), Tile(16, 128, 2, 1)
    found = [outcome_of("bf16", plain), outcome_of("bf16", featured, tiles.FEATURED)]
    title, *lines = tuning.proposals(found)
    assert title == "Rows of fastattn/ops/attention/tiles.py that would change:"
    assert parsed(lines) == {(tiles.FORWARD, "hopper", 64): (plain, featured, CROWDED)}
    assert lines[0].endswith(
        "# plain: bf16 1.250x [1.200, 1.300]; featured: bf16 1.250x [1.200, 1.300]"
    )
    _, *lines = tuning.proposals(found[:1])
    assert parsed(lines) == {(tiles.FORWARD, "hopper", 64): (plain, FEATURED, CROWDED)}
    entry = Entry(tiles.QUERIES, "fp32", 256, tiles.FEATURED, 90)
    _, *lines = tuning.proposals([Outcome(entry, entry.tile(), proposed=featured)])
    assert parsed(lines) == {
        (tiles.QUERIES, 256): (entry.tile(tiles.PLAIN), featured, entry.tile(tiles.CROWDED)),
    }


def test_dtypes_that_share_a_row_must_agree() -> None:
    faster = Tile(64, 64, 4, 2)
    _, *lines = tuning.proposals([outcome_of("bf16", faster), outcome_of("fp16", faster)])
    assert list(parsed(lines).values()) == [(faster, FEATURED, CROWDED)]
    _, *lines = tuning.proposals([outcome_of("bf16", faster), outcome_of("fp16", None)])
    assert lines == [
        '    # (FORWARD, "hopper", 64) plain stays, dtypes disagree: '
        "bf16 1.250x [1.200, 1.300], fp16 as it is"
    ]
    assert parsed(lines) == {}


def test_nothing_to_change_is_said() -> None:
    lines = list(tuning.proposals([outcome_of("bf16", None)]))
    assert lines == ["No row of fastattn/ops/attention/tiles.py would change."]
