"""Records to examples in a folder, once: what was prepared before is opened.

Each preparation has a folder of its own, named after its fingerprint: the objective, its settings,
the tokenizer and the files with their sizes and times. So nothing is ever overwritten, and runs
with other settings share a folder in peace. It is written beside and renamed, so that it is there
whole or not at all. A second process waits for the first one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

import fastattn
from fastattn.files import folder_written_beside, local_path
from fastattn.training.contract import Example, Objective
from fastattn.training.data.formats import Documents, Sourced
from fastattn.training.data.sources import AnyPath, find_files, read_records
from fastattn.training.data.storage import BLOCK, DTYPES, FORMAT, INDEX, TABLE, Examples, checksums

PENDING = 1 << 20  # values that are in memory before they are written

OnProgress = Callable[[int, int], None]


def prepare(
    paths: AnyPath | Sequence[AnyPath],
    objective: Objective,
    folder: AnyPath,
    *,
    documents: Documents = "file",
    on_progress: OnProgress | None = None,
) -> Examples:
    """The examples that `objective` makes of files, written below `folder` unless they are there.

    They are made again when a file, its time, a setting of the objective, the tokenizer or the
    version of fastattn is another; former ones stay, in folders of their own.

    Args:
        paths, documents: see `read_records`.
        on_progress: called now and then with the numbers of records and of values (tokens of all
            fields) so far.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `read_records`; or the objective refuses a
            record, and the message begins with its place; or there is no example at all; or a file
            of a former preparation is damaged.
        OSError: the folder cannot be written.
    """
    files = find_files(paths)
    fingerprint = {
        "format": FORMAT,
        "fastattn": fastattn.__version__,
        "objective": objective.fingerprint(),
        "tokenizer": objective.tokenizer.fingerprint,
        "documents": documents,
        "files": [_identity(file) for file in files],
    }
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    place = local_path("folder", folder)
    for file in files:
        if place.resolve() in file.resolve().parents:
            raise ValueError(f"folder {place} holds data, {file}: give the examples another one")
    home = place / "examples"  # nobody else writes here
    target = home / f"{objective.name}-{digest[:16]}"
    if not target.is_dir():
        sourced = read_records(files, documents)
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home):
            if not target.is_dir():  # another process was quicker
                _write(sourced, objective, target, fingerprint, on_progress)
    return Examples(target)


def _identity(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Only one process at a time writes into `home`; a lock ends with its process."""
    with open(home / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in home.glob(".saving-*"):  # by one that was killed
            shutil.rmtree(left)
        yield


def _write(
    records: Iterator[Sourced],
    objective: Objective,
    target: Path,
    fingerprint: dict[str, Any],
    on_progress: OnProgress | None,
) -> None:
    with folder_written_beside(target, INDEX, lambda name: False) as beside:
        writer = _Writer(beside, objective.fields)
        for number, (place, record) in enumerate(records):
            try:
                for example in objective.encode(record):
                    writer.add(number, example)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: {error}") from error
            if writer.pending >= PENDING:
                writer.flush()
                if on_progress is not None:
                    on_progress(number + 1, sum(writer.ends))
        if not any(writer.ends):
            raise ValueError(f"the objective {objective.name!r} made no example of the records")
        index = {"fingerprint": fingerprint, "files": writer.close()}
        (beside / INDEX).write_text(json.dumps(index), encoding="utf-8")


class _Writer:
    """Examples to the files that `Examples` reads."""

    def __init__(self, folder: Path, fields: Sequence[str]) -> None:
        self.pending = 0
        self.ends = [0] * len(fields)
        dtypes = tuple(DTYPES.values())
        self._columns = {name: _Column(folder / f"{name}.bin", dtypes) for name in fields}
        self._table = _Column(folder / f"{TABLE}.bin", dtypes[-1:])

    def add(self, record: int, example: Example) -> None:
        if example.keys() != self._columns.keys():
            raise ValueError(
                f"an example must have the fields {', '.join(self._columns)}, got "
                f"{', '.join(example) or 'none'}"
            )
        for i, (name, column) in enumerate(self._columns.items()):
            values = example[name]
            whole = numpy.can_cast(values.dtype, numpy.int64) or not values.size
            if values.ndim != 1 or not whole:
                raise ValueError(
                    f"{name} of an example must be integers in one dimension, got "
                    f"{values.dtype} {values.shape}"
                )
            if i == 0 and not values.size:
                raise ValueError(f"{name} of an example is empty")
            column.append(values)
            self.ends[i] += values.size
            self.pending += values.size
        self._table.append(numpy.array([record, *self.ends]))

    def flush(self) -> None:
        for column in (*self._columns.values(), self._table):
            column.flush()
        self.pending = 0

    def close(self) -> dict[str, Any]:
        """The index's entry for each file: dtype, count, checksums."""
        self.flush()
        columns = {**self._columns, TABLE: self._table}
        return {name: column.about() for name, column in columns.items()}


class _Column:
    """Integers, appended to a file in the first of some dtypes that holds them all."""

    def __init__(self, path: Path, dtypes: Sequence[numpy.dtype]) -> None:
        self._path = path
        self._dtypes = dtypes
        self._pending = array("q")
        path.touch()

    def append(self, values: numpy.ndarray) -> None:
        self._pending.frombytes(values.astype(numpy.int64).tobytes())

    def flush(self) -> None:
        if not self._pending:
            return
        values = numpy.frombuffer(self._pending, numpy.int64)
        while not _holds(self._dtypes[0], values):
            self._widen()
        with open(self._path, "ab") as file:
            file.write(values.astype(self._dtypes[0]).tobytes())
        self._pending = array("q")

    def about(self) -> dict[str, Any]:
        dtype = self._dtypes[0]
        count = self._path.stat().st_size // dtype.itemsize
        return {"dtype": dtype.str, "count": count, "checksums": checksums(self._path)}

    def _widen(self) -> None:
        """Write the file again, in the next dtype."""
        narrow, wide = self._dtypes[:2]
        temporary = self._path.with_suffix(".wide")
        with open(self._path, "rb") as source, open(temporary, "wb") as target:
            for block in iter(lambda: source.read(BLOCK), b""):
                target.write(numpy.frombuffer(block, narrow).astype(wide).tobytes())
        temporary.replace(self._path)
        self._dtypes = self._dtypes[1:]


def _holds(dtype: numpy.dtype, values: numpy.ndarray) -> bool:
    limits = numpy.iinfo(dtype)
    return bool(limits.min <= values.min() and values.max() <= limits.max)
