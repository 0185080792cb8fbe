"""Interleaved timing, of calls whose times are known."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import schema

from fastattn import timing
from fastattn.timing import Candidate, Sample, Spread


def spinning(seconds: float) -> Callable[[], None]:
    def spin() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return spin


@pytest.fixture
def said_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take what they say they take: no clock, no noise."""
    monkeypatch.setattr(timing, "batch_time", lambda c, calls, device: calls * c.call())


@pytest.mark.usefixtures("said_times")
def test_comparison_of_known_times() -> None:
    drift = itertools.count(1)  # the machine gets slower all the time; the ratio does not see it

    def call() -> float:
        return 1e-3 * (next(drift) // 2 * 2)

    pair = [Candidate("one", call), Candidate("three", lambda: 3 * call())]
    samples = timing.interleave(pair, rounds=5, batch_seconds=0.0)
    assert samples["one"].seconds[-1] > samples["one"].seconds[0]
    assert timing.ratio(samples["three"], samples["one"]).median == pytest.approx(3.0, rel=0.3)
    assert timing.difference(samples["three"], samples["one"]).median > 0


@pytest.mark.usefixtures("said_times")
def test_short_calls_fill_a_batch_and_long_ones_run_once() -> None:
    pair = [Candidate("short", lambda: 1e-6), Candidate("long", lambda: 2e-3)]
    samples = timing.interleave(pair, rounds=3, batch_seconds=1e-3)
    assert 1000 <= samples["short"].calls <= 2000
    assert samples["short"].seconds == pytest.approx([1e-6] * 3)
    assert samples["long"].calls == 1


@pytest.mark.usefixtures("said_times")
def test_a_warm_up_ends_when_the_calls_get_no_faster() -> None:
    """A call that needs ten runs to come down to its time: none of those is measured."""
    takes = itertools.chain([1.0 / 2**n for n in range(10)], itertools.repeat(1e-3))
    samples = timing.interleave([Candidate("x", lambda: next(takes))], rounds=3, batch_seconds=0.0)
    assert samples["x"].seconds == (1e-3,) * 3


def test_the_clock_of_the_cpu_counts_all_calls() -> None:
    assert timing.batch_time(Candidate("x", spinning(1e-3)), 5, "cpu") >= 5e-3


def test_candidates_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def noting(name: str) -> Candidate:
        return Candidate(name, lambda: order.append(name))

    timing.interleave([noting("a"), noting("b")], rounds=3, batch_seconds=0.0)
    assert "".join(order[-6:]) == "abbaab"


def test_time_is_bounded_though_not_below_the_least_rounds() -> None:
    samples = timing.interleave(
        [Candidate("slow", spinning(5e-3))], rounds=1000, seconds=0.02, least_rounds=2
    )
    assert 2 <= len(samples["slow"].seconds) < 100


def test_context_is_entered_around_batches_not_calls() -> None:
    calls = itertools.count()
    entered: list[int] = []

    class Context:
        def __enter__(self) -> None:
            entered.append(next(calls))

        def __exit__(self, *_: object) -> None:
            pass

    timing.interleave([Candidate("x", lambda: next(calls), Context)], rounds=2, batch_seconds=1e-4)
    assert len(entered) < 20  # the warm-up's few batches and two rounds
    assert next(calls) > 100


def test_rotation_takes_every_set_of_inputs_in_turn() -> None:
    seen: list[int] = []
    call = timing.rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_spread_is_median_and_percentiles() -> None:
    assert Spread.of(range(11)) == Spread(median=5.0, p20=2.0, p80=8.0)
    entry = Sample((3e-6, 1e-6, 2e-6), calls=7).as_dict()
    assert entry == pytest.approx(
        {"median_us": 2.0, "p20_us": 1.4, "p80_us": 2.6, "rounds": 3, "calls": 7}
    )
    schema.check(entry, schema.Entry)
