"""What the scripts write and print."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import results
from environment import environment


def test_table_aligns_its_columns() -> None:
    lines = results.table(("op", "us"), [("norm", 1.5), ("attention", 12)]).splitlines()
    assert lines == ["op          us", "-" * 14, "norm       1.5", "attention   12"]


def test_json_is_strict_where_numbers_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results.write_json(path, {"errors": [math.nan, math.inf, 1.0]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "errors": ["nan", "inf", 1.0]
    }


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write_json(path, {"kept": True})
    with pytest.raises(TypeError):
        results.write_json(path, {"kept": object()})
    assert json.loads(path.read_text()) == {"kept": True}
    assert list(tmp_path.iterdir()) == [path]


def test_environment_names_what_was_measured() -> None:
    here = environment("cpu", commit="abc")
    assert here["commit"] == "abc"
    assert here["device"] and here["date"] and here["packages"]["torch"]
    json.dumps(here)
