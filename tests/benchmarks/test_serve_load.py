"""The load of `fastattn serve`: a short one, and how it is judged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import serve_load


def test_growth_is_of_what_comes_after_the_warm_up() -> None:
    assert serve_load.growth([10, 50, *[100] * 8]) == 0
    assert serve_load.growth([100] * 9 + [110]) == pytest.approx(0.1)
    assert serve_load.growth([*range(100, 200)]) == pytest.approx(194.5 / 124.5 - 1)


def test_a_failure_or_growth_is_not_good(capsys: pytest.CaptureFixture[str]) -> None:
    class Server:
        kills = 0
        memory = [2**20] * 10

    server: Any = Server()
    assert serve_load.report(serve_load.Record(whole=[0.1, 0.2]), server)
    assert "p50 200 ms" in capsys.readouterr().out
    assert not serve_load.report(serve_load.Record(), server)
    assert not serve_load.report(serve_load.Record(whole=[0.1], failures=["x"]), server)
    server.memory = [100] * 9 + [106]
    assert not serve_load.report(serve_load.Record(whole=[0.1]), server)


def _load(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["serve_load.py", "--clients", "8", *options])
    return serve_load.main()


@pytest.mark.long
def test_under_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _load(monkeypatch, "--minutes", "0.33") == 0, capsys.readouterr().out


@pytest.mark.long
def test_killed_under_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _load(monkeypatch, "--minutes", "0.5", "--kill") == 0, capsys.readouterr().out
    assert "after 1 kills: 0" not in capsys.readouterr().out


@pytest.mark.long
def test_a_wrong_answer_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = serve_load.make_cases

    def wrong(*args: Any) -> Any:
        cases = made(*args)

        class Spoiled(serve_load.Case):
            answer = property(lambda self: "wrong", lambda self, _: None)  # type: ignore[assignment]

        return [*cases[:-1], Spoiled(cases[-1].path, cases[-1].body)]

    monkeypatch.setattr(serve_load, "make_cases", wrong)
    assert _load(monkeypatch, "--minutes", "0.1") == 1
    assert "is not 'wrong'" in capsys.readouterr().out
