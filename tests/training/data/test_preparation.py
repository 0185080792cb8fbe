"""Shards: written once, whole or not at all, found when they are damaged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from training.data.counted import Numbers, NumbersSettings, Pairs, write_records

from fastattn.training import Tokenizer
from fastattn.training.contract import Objective
from fastattn.training.data import Examples, Packed, preparation, prepare, storage
from fastattn.training.objectives.causal import Causal
from fastattn.training.objectives.chat import Chat


def as_lists(examples: Examples) -> list[dict[str, list[int]]]:
    return [{name: array.tolist() for name, array in example.items()} for example in examples]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("pending", [1, 100, 1 << 20])
@pytest.mark.parametrize("block", [8, 64, 1 << 20])
def test_examples_are_those_that_were_made(
    pending: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PENDING", pending)
    monkeypatch.setattr(preparation, "BLOCK", block)
    monkeypatch.setattr(storage, "BLOCK", block)
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
    assert {array.dtype for example in examples for array in example.values()} == {
        numpy.dtype("int64")
    }
    assert examples.sizes.tolist() == [[len(e["source"]), len(e["target"])] for e in expected]
    assert examples.lengths.tolist() == [len(e["source"]) for e in expected]
    assert as_lists(pickle.loads(pickle.dumps(examples))) == expected
    assert len(pickle.dumps(examples)) < 1000
    sizes = {name: len(data) for name, data in contents(examples.folder).items()}
    assert sizes["target.bin"] == sum(len(e["target"]) for e in expected)  # a byte each
    assert examples[-1]["source"].tolist() == expected[-1]["source"]
    with pytest.raises(IndexError, match=f"there are {len(expected)} examples"):
        examples[len(expected)]


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


def test_a_part_to_validate_is_of_whole_records_at_even_distances(tmp_path: Path) -> None:
    records = [{"ids": [[i], [i, i]][: 1 + i % 2]} for i in range(40)]
    path = write_records(tmp_path / "data.jsonl", records)
    examples = prepare(path, Numbers(), tmp_path / "examples")
    for fraction in (0.1, 0.25, 0.9):
        training, validation = examples.split(fraction)
        sides = [
            {e["ids"][0] for e in map(dict, as_lists(part))} for part in (training, validation)
        ]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(40))
        assert len(sides[1]) == 40 * fraction
        assert len(training) + len(validation) == 60
        gaps = numpy.diff(sorted(sides[1]))
        assert gaps.max() - gaps.min() <= 1
        assert training.lengths.tolist() == [len(e["ids"]) for e in as_lists(training)]
        assert as_lists(pickle.loads(pickle.dumps(validation))) == as_lists(validation)
        assert len({e.fingerprint for e in (examples, training, validation)}) == 3
    again = examples.split(0.5)[0].split(0.5)
    assert len({e["ids"][0] for e in as_lists(again[1])}) == 10
    with pytest.raises(ValueError, match=r"40 records are too few to keep 0\.01 of them"):
        examples.split(0.01)
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
    fingerprints = {Examples(folder).fingerprint for folder in home.glob("examples/numbers-*")}
    assert len(fingerprints) == 3  # [1, 2], [3], [1, 7]: of the data, not of their files' times

    moved = first.folder.rename(tmp_path / "moved")
    assert Examples(moved).fingerprint == first.fingerprint


def forked(work: Callable[[], object]) -> int:
    """Start a process that does `work` and ends: with 0, or 1 after an exception."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    """How it ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


RECORDS = [{"ids": [[i * j for j in range(1 + i % 7)]]} for i in range(300)]


class Killing:
    """An audit hook that kills the process before a file operation: its n-th since it was set."""

    def __init__(self, n: int) -> None:
        self.left = n
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "os.scandir"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def test_killed_before_any_file_operation_nothing_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PENDING", 500)  # written in three pieces
    path = write_records(tmp_path / "data.jsonl", RECORDS)
    whole = tmp_path / "whole"
    prepare(path, Numbers(), whole)
    expected = contents(whole)

    n, killed = 0, True
    while killed:
        n += 1
        home = tmp_path / str(n)

        def work(n: int = n, home: Path = home) -> None:
            Killing(n)
            prepare(path, Numbers(), home)

        code = ended(forked(work))
        assert code in (0, -signal.SIGKILL)
        killed = code != 0
        for folder in home.glob("examples/numbers-*"):  # what has its name is whole
            assert contents(folder) == contents(next(whole.glob("examples/numbers-*")))
        prepare(path, Numbers(), home)
        assert contents(home) == expected  # and no rest of the killed one
    assert n > 20


def test_processes_at_once_share_the_work(tmp_path: Path) -> None:
    path = write_records(tmp_path / "data.jsonl", RECORDS)
    encoded = tmp_path / "encoded"

    class Counting(Numbers):
        def encode(self, record):
            with open(encoded, "ab") as file:  # one write, at the end whoever else writes
                file.write(b".")
            return super().encode(record)

    def work() -> None:
        assert as_lists(prepare(path, Counting(), tmp_path / "examples"))[-1]["ids"][-1] == 299 * 5

    assert [ended(process) for process in [forked(work) for _ in range(4)]] == [0] * 4
    assert len(encoded.read_bytes()) == len(RECORDS)


def test_damage_is_found_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK", 64)
    path = write_records(tmp_path / "data.jsonl", [{"ids": [[i] * 8 for i in range(100)]}])
    folder = prepare(path, Numbers(), tmp_path / "examples").folder
    file = folder / "ids.bin"
    whole = file.read_bytes()  # eight examples a block

    damaged = bytearray(whole)
    damaged[64 * 3 + 5] ^= 4
    file.write_bytes(damaged)
    examples = prepare(path, Numbers(), tmp_path / "examples")
    assert examples[0]["ids"].tolist() == [0] * 8
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"ids\.bin is damaged: the checksum of block 3 differs"
        ):
            examples[25]
    with pytest.raises(ValueError, match=f"delete the folder {folder} to have it written again"):
        list(Packed(examples, Numbers(), 50, 50, 0).once())

    for data in (whole[:-1], whole + b"0", b""):
        file.write_bytes(data)
        with pytest.raises(
            ValueError, match=f"ids.bin is damaged: it has {len(data)} bytes of 800"
        ):
            prepare(path, Numbers(), tmp_path / "examples")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"ids\.bin"):
        Examples(folder)
    file.write_bytes(whole)

    table = folder / "examples.bin"
    rows = bytearray(table.read_bytes())
    rows[-5] ^= 1
    table.write_bytes(rows)
    with pytest.raises(
        ValueError, match=r"examples\.bin is damaged: the checksum of block 24 differs"
    ):
        Examples(folder)
    index = (folder / "index.json").read_text()
    for text in ("", index[:-9], "[]", "{}"):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            Examples(folder)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"ids": numpy.array([], dtype=int)}, "ids of an example is empty"),
        ({"ids": numpy.array([0.5])}, r"must be integers in one dimension, got float64 \(1,\)"),
        ({"ids": numpy.array([2**63])}, r"must be integers in one dimension, got uint64 \(1,\)"),
        ({"ids": numpy.array([[1]])}, r"must be integers in one dimension, got int64 \(1, 1\)"),
        ({"labels": numpy.array([1])}, "must have the fields ids, got labels"),
    ],
)
def test_an_example_that_is_none_is_named(example: dict, message: str, tmp_path: Path) -> None:
    class Wrong(Numbers):
        def encode(self, record):
            return [example]

    path = write_records(tmp_path / "data.jsonl", [{}])
    with pytest.raises(ValueError, match=rf"data\.jsonl:1: .*{message}"):
        prepare(path, Wrong(), tmp_path / "examples")
    assert not contents(tmp_path / "examples")


def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "examples"
    causal = Causal(Tokenizer.train(["some text"], vocab_size=300))
    path = tmp_path / "data.jsonl"
    for line, message in [
        ('{"txt": "a"}', "data.jsonl:2: a record has no field 'text'; fields: txt"),
        ('{"text": "\\ud800"}', "data.jsonl:2: .*surrogates not allowed"),
        ('{"text": "a', "data.jsonl:2: each line must be one whole object"),
    ]:
        path.write_text('{"text": "good"}\n' + line)
        with pytest.raises(ValueError, match=message):
            prepare(path, causal, home)
    chat = Chat(Tokenizer.train(["some text"], vocab_size=300, extra_tokens=Chat.extra_tokens))
    write_records(path, [{"messages": "hello"}])
    with pytest.raises(ValueError, match=r"data\.jsonl:1: messages must be a list"):
        prepare(path, chat, home)
    write_records(path, [{"ids": []}])
    with pytest.raises(ValueError, match="the objective 'numbers' made no example of the records"):
        prepare(path, Numbers(), home)
    with pytest.raises(ValueError, match=r"holds data, \S+data\.jsonl: give the examples another"):
        prepare(path, Numbers(), tmp_path)
    with pytest.raises(ValueError, match="documents must be one of"):
        prepare(path, Numbers(), home, documents="words")
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare(tmp_path / "none.txt", Numbers(), home)

    write_records(path, RECORDS)
    with pytest.raises(OSError, match=r"data\.jsonl"):  # a file where the folder would be
        prepare(path, Numbers(), path / "examples")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(preparation, "checksums", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare(path, Numbers(), home)
    assert not contents(home)


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "PENDING", 100)
    path = write_records(tmp_path / "data.jsonl", RECORDS)
    told: list[tuple[int, int]] = []
    prepare(path, Numbers(), tmp_path / "examples", on_progress=lambda *seen: told.append(seen))
    assert len(told) > 5 and told == sorted(told)
    for records, values in told:
        assert values == sum(len(record["ids"][0]) for record in RECORDS[:records])
