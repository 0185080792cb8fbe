"""Results files: what fits is written and read, all else is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import schema
from environment import environment
from schema import SchemaError


@pytest.fixture
def results() -> Any:
    return {
        "schema": schema.SCHEMA,
        "subject": "attention",
        "device": "cpu",
        "preset": "quick",
        "command": ["benchmarks/attention.py"],
        "environment": environment("cpu", commit="abc"),
        "method": {"clock": "timeit"},
        "rows": [
            {
                "title": "attention forward",
                "op": "attention",
                "direction": "forward",
                "dtype": "float32",
                "axes": {"seqlen": 512},
                "right": True,
                "peers": {"ours": {"median_us": 1.0, "calls": 2}},
            }
        ],
        "skipped": [{"title": "x", "why": "the time was over"}],
        "seconds": 1,
    }


def test_there_and_back(results: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    schema.write(path, results)
    assert schema.read(path) == schema.finite(results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("preset"), "results lacks preset"),
        (lambda r: r.update(more=1), "results has the unknown more"),
        (lambda r: r.update(device="tpu"), r"results\.device must be 'cpu' or 'cuda'"),
        (lambda r: r.update(schema="1"), r"results\.schema must be"),
        (lambda r: r.update(rows={}), r"results\.rows must be a list; got dict"),
        (lambda r: r["rows"][0].pop("title"), r"results\.rows\[0\] lacks title"),
        (lambda r: r["rows"][0].update(right=1), r"rows\[0\]\.right must be of type bool; got 1"),
        (lambda r: r["rows"][0]["peers"]["ours"].update(median_us="fast"), r"peers\['ours'\]\.median_us must be a finite number"),
        (lambda r: r["rows"][0]["peers"]["ours"].update(rounds=True), "rounds must be an integer"),
        (lambda r: r["rows"][0]["peers"]["ours"].update(gbps=math.nan), r"gbps must be a finite number; got 'nan'"),
        (lambda r: r["rows"][0]["peers"]["ours"].update(samples=[1.0]), "has the unknown samples"),
        (lambda r: r["environment"].pop("commit"), r"results\.environment lacks commit"),
        (lambda r: r["environment"].update(cuda={}), r"results\.environment\.cuda lacks"),
        (lambda r: r["command"].append(1), r"results\.command\[1\] must be of type str; got 1"),
        (lambda r: r["method"].update({1: "x"}), r"results\.method must be an object"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_place(
    change: Any, message: str, results: Any, tmp_path: Path
) -> None:
    changed = copy.deepcopy(results)
    change(changed)
    path = tmp_path / "results.json"
    with pytest.raises(SchemaError, match=message):
        schema.write(path, changed)
    assert not path.exists()


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(SchemaError, match=r"results\.json: Expecting"):
        schema.read(path)
    path.write_text("[]")
    with pytest.raises(SchemaError, match=r"results\.json: results must be an object; got list"):
        schema.read(path)


def test_numbers_that_are_not_finite_are_strings(results: Any, tmp_path: Path) -> None:
    """An error may be infinite, a time may not."""
    error = {"max": math.inf, "rms": math.nan, "eager_max": 1.0, "eager_rms": 1.0, "within": False}
    results["rows"][0]["peers"]["ours"]["errors"] = [error]
    path = tmp_path / "results.json"
    schema.write(path, results)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = schema.read(path)["rows"][0]["peers"]["ours"]["errors"][0]
    assert (found["max"], found["rms"]) == ("inf", "nan")


def test_a_failing_write_leaves_the_old_file(results: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    schema.write(path, results)
    with pytest.raises(SchemaError):
        schema.write(path, {**results, "rows": 1})
    with pytest.raises(TypeError):
        schema.write_json(path, {"x": object()})
    assert schema.read(path) == schema.finite(results)
    assert list(tmp_path.iterdir()) == [path]


def test_environment_names_what_was_measured() -> None:
    here = environment("cpu", commit="abc")
    schema.check(here, schema.Environment)
    assert (here["commit"], here["modified"]) == ("abc", False)
    assert here["device"] and here["date"] and here["packages"]["torch"]
    assert len(here["affinity"]) <= here["processors"]
