"""Shards: written once, whole or not at all, found when they are damaged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from training.data.counted import Numbers, NumbersSettings, numbered, write_records

from fastattn.training import Tokenizer, load_corpus
from fastattn.training.contract import Objective
from fastattn.training.data import Examples, Packed, prepare, preparation, shards
from fastattn.training.objectives.causal import Causal


def as_lists(examples: Examples) -> list[dict[str, list[int]]]:
    return [{name: array.tolist() for name, array in example.items()} for example in examples]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Pairs(Numbers):
    """Two fields of lengths that differ."""

    name = "pairs"
    fields = ("source", "target")

    def encode(self, record):
        for source, target in record["pairs"]:
            yield {"target": numpy.array(target), "source": numpy.array(source)}


@pytest.mark.parametrize("pending", [1, 100, 1 << 20])
@pytest.mark.parametrize("block", [8, 64, 1 << 20])
def test_examples_are_those_that_were_made(
    pending: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PENDING", pending)
    monkeypatch.setattr(preparation, "BLOCK", block)
    monkeypatch.setattr(shards, "BLOCK", block)
    draw = random.Random(pending * block)
    ranges = [(0, 255), (0, 65535), (-100, 65535), (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)]

    def values(i: int, at_least: int) -> list[int]:
        low, high = ranges[i // 10]
        return [draw.randint(low, high) for _ in range(draw.randrange(at_least, 30))]

    records = [
        {"pairs": [(values(i, 1), values(0, 0)) for _ in range(draw.randrange(4))]}
        for i in range(len(ranges) * 10)
    ]
    path = write_records(tmp_path / "data.jsonl", records)
    examples = prepare(path, Pairs(), tmp_path / "examples")
    expected = [
        {"source": source, "target": target}
        for record in records
        for source, target in record["pairs"]
    ]
    assert as_lists(examples) == expected
    assert {array.dtype for example in examples for array in example.values()} == {numpy.dtype("int64")}
    assert examples.lengths.tolist() == [[len(e["source"]), len(e["target"])] for e in expected]
    assert as_lists(pickle.loads(pickle.dumps(examples))) == expected
    assert len(pickle.dumps(examples)) < 1000
    sizes = {name: len(data) for name, data in contents(examples.folder).items()}
    assert sizes["target.bin"] == sum(len(e["target"]) for e in expected)  # a byte each
    assert examples[-1]["source"].tolist() == expected[-1]["source"]
    with pytest.raises(IndexError, match=f"there are {len(expected)} examples"):
        examples[len(expected)]
    assert {n.tolist()[0] for n in [examples[3]["source"][:1]]} == {expected[3]["source"][0]}


@pytest.mark.parametrize(
    ("largest", "smallest", "dtype"),
    [(255, 0, "|u1"), (256, 0, "<u2"), (65535, 0, "<u2"), (65536, 0, "<i4"), (1, -100, "<i4")],
)
def test_a_field_has_the_narrowest_dtype(
    largest: int, smallest: int, dtype: str, tmp_path: Path
) -> None:
    path = write_records(tmp_path / "data.jsonl", [{"ids": [[1, 2], [largest, smallest]]}])
    examples = prepare(path, Numbers(), tmp_path / "examples")
    index = json.loads((examples.folder / "index.json").read_text())
    assert index["files"]["ids"]["dtype"] == dtype
    assert as_lists(examples) == [{"ids": [1, 2]}, {"ids": [largest, smallest]}]


def test_a_text_of_all_records_is_split_by_records(tmp_path: Path) -> None:
    records = [{"ids": [[i], [i, i]][: 1 + i % 2]} for i in range(40)]
    path = write_records(tmp_path / "data.jsonl", records)
    examples = prepare(path, Numbers(), tmp_path / "examples")
    for fraction in (0.1, 0.25, 0.9):
        training, validation = examples.split(fraction)
        sides = [{e["ids"][0] for e in map(dict, as_lists(part))} for part in (training, validation)]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(40))
        assert len(sides[1]) == 40 * fraction
        assert len(training) + len(validation) == 60
        gaps = numpy.diff(sorted(sides[1]))
        assert gaps.max() - gaps.min() <= 1
        assert training.lengths[:, 0].tolist() == [len(e["ids"]) for e in as_lists(training)]
        assert as_lists(pickle.loads(pickle.dumps(validation))) == as_lists(validation)
        assert len({e.fingerprint for e in (examples, training, validation)}) == 3
    again = examples.split(0.5)[0].split(0.5)
    assert len({e["ids"][0] for e in as_lists(again[1])}) == 10
    for fraction in (0.01, 0.999):
        with pytest.raises(ValueError, match="of 40 records"):
            examples.split(fraction)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\)"):
        examples.split(1)


def test_what_was_prepared_is_opened_and_another_is_made(tmp_path: Path) -> None:
    path = write_records(tmp_path / "data.jsonl", [{"ids": [[1, 2]], "more": [[3]]}])
    home = tmp_path / "examples"
    calls = []

    class Counting(Numbers):
        def encode(self, record):
            calls.append(record)
            return super().encode(record)

    def prepared(objective: Objective | None = None, documents: str = "file") -> list:
        calls.clear()
        examples = as_lists(prepare(path, objective or Counting(), home, documents=documents))
        return [len(calls), *(example["ids"] for example in examples)]

    assert prepared() == [1, [1, 2]]
    assert prepared() == [0, [1, 2]]
    assert prepared(Counting(NumbersSettings("more"))) == [1, [3]]
    other = Counting()
    other.tokenizer.fingerprint = "of another"
    assert prepared(other) == [1, [1, 2]]
    assert prepared(documents="line") == [1, [1, 2]]
    first = prepare(path, Counting(), home)
    write_records(path, [{"ids": [[1, 7]], "more": [[3]]}])  # of the same size
    os.utime(path, ns=(1, 1))
    assert prepared() == [1, [1, 7]]
    assert prepared() == [0, [1, 7]]
    os.utime(path, ns=(2, 2))
    assert prepared() == [1, [1, 7]]  # its time says that it may be another
    assert first[0]["ids"].tolist() == [1, 2]  # is still there
    fingerprints = {Examples(folder).fingerprint for folder in home.glob("numbers-*")}
    assert len(fingerprints) == 3  # [1, 2], [3], [1, 7]: of the data, not of their files' times

    moved = first.folder.rename(tmp_path / "moved")
    assert Examples(moved).fingerprint == first.fingerprint


def test_a_prepared_folder_may_be_read_only(tmp_path: Path) -> None:
    examples, lists = numbered(tmp_path, [3, 4])
    (examples.folder.parent / ".lock").unlink()
    assert as_lists(numbered(tmp_path, [3, 4])[0]) == [{"ids": ids} for ids in lists]
