"""TOML: what is written is read again, overrides, and errors with their place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.training.runs import toml

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")

SCALARS = st.text(max_size=9) | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
VALUES = SCALARS | st.booleans() | st.lists(SCALARS, max_size=3)
TABLES = st.dictionaries(
    st.text(max_size=5), VALUES | st.fixed_dictionaries({"x y": VALUES}), max_size=4
)


@settings(max_examples=20, deadline=None)
@given(TABLES)
def test_what_is_written_is_read(table: dict[str, Any]) -> None:
    assert toml.parsed(toml.written({"name": table})) == {"name": table}


def test_none_is_a_word() -> None:
    assert toml.written({"a": {"b": None, "c": (1, None)}}) == '[a]\nb = "none"\nc = [1, "none"]\n'


def test_overrides() -> None:
    tables = {"training": {"steps": 1, "betas": [0.9, 0.95]}}
    overrides = [
        "training.steps=1_000", "training.precision=bfloat16", "training.betas=[0.8, 0.9]",
        "data.training=texts/*.txt", "data.training=texts/a=b.txt", 'model.preset="gpt2"',
        "model.config.n_layer=2", "training.learning_rate=1e-3", "output.empty=",
    ]  # fmt: skip
    assert toml.overridden(tables, overrides) == {
        "training": {
            "steps": 1000, "betas": [0.8, 0.9], "precision": "bfloat16", "learning_rate": 1e-3,
        },
        "data": {"training": "texts/a=b.txt"},
        "model": {"preset": "gpt2", "config": {"n_layer": 2}},
        "output": {"empty": ""},
    }  # fmt: skip
    assert tables == {"training": {"steps": 1, "betas": [0.9, 0.95]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "must be table.key=value, as training.steps=100; got"),
        ("=3", "must be table.key=value"),
        ("training..steps=3", "must be table.key=value"),
        ("training.steps.more=3", "'steps' is no table"),
        ("data.training=[a.txt]", "has no value of TOML"),
        ('a.b="x', "has no value of TOML"),
        ("a.b=1\nc=2", "has more than a value"),
    ],
)
def test_overrides_that_are_none(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toml.overridden({"training": {"steps": 1}}, [override])


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf[a]\r\nb = 1\r\n")  # as some editors write
    assert toml.read(file) == {"a": {"b": 1}}
    file.write_text("[a]\nb = 1\nc 2\n")
    with pytest.raises(ValueError, match=r"config\.toml: .*line 3"):
        toml.read(file)
    file.write_bytes(b"[a]\nb = '\xff'\n")
    with pytest.raises(ValueError, match=r"config\.toml is not UTF-8: .*position 9"):
        toml.read(file)
    with pytest.raises(FileNotFoundError, match="there is no config file"):
        toml.read(tmp_path / "other.toml")
    with pytest.raises(FileNotFoundError, match="there is no config file"):
        toml.read(tmp_path)
