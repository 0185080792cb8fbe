"""Examples in memory-mapped files: what `prepare` wrote, read as a sequence.

    index.json    what is in the other files, with their checksums; there only when they are whole
    FIELD.bin     the values of a field, example after example, little-endian
    examples.bin  int64 (examples, 1 + fields): the number of the record that an example was made
                  of, and where it ends in each field's file; it begins where the one before ends

A block of a file is checked when it is first read, so that opening takes no time and no damaged
token is ever learned.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from fastattn.files import read_json
from fastattn.nn.checks import check_integer, check_within
from fastattn.training.contract import Example

BLOCK = 1 << 20  # bytes that have one checksum; a multiple of every dtype's size
INDEX = "index.json"
TABLE = "examples"  # a field cannot have this name
FORMAT = 1  # of these files
# A field's file has the first of these that holds all its values: token ids of most vocabularies
# have two bytes, masks one.
DTYPES = {name: numpy.dtype(name) for name in ("|u1", "<u2", "<i4", "<i8")}


class Examples(Sequence[Example]):
    """Examples that lie in a folder: `prepare` makes them.

        examples[3]["input_ids"]  # int64, whatever the file has
        training, validation = examples.split(0.1)

    Pickling and forking copy no data. Reading raises ValueError where a file is damaged.

    Attributes:
        fields: the names of an example's arrays.
        fingerprint: of the data themselves: the same wherever the folder is and whenever it was
            made.
    """

    def __init__(self, folder: Path, chosen: numpy.ndarray | None = None) -> None:
        """Args: folder: of `prepare`; chosen: the numbers of the examples to have (None: all).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or cut off.
        """
        self.folder = folder
        self._chosen = chosen
        files = _files_of(folder)
        arrays = {name: _Array(folder / f"{name}.bin", about) for name, about in files.items()}
        table = arrays.pop(TABLE)
        table.check(0, len(table.values))
        self.fields = tuple(arrays)
        self._arrays = tuple(arrays.values())
        self._table = table.values.reshape(-1, 1 + len(self.fields))
        contents = json.dumps(files).encode() + (b"" if chosen is None else chosen.tobytes())
        self.fingerprint = hashlib.sha256(contents).hexdigest()

    def __reduce__(self) -> tuple[type, tuple[Path, numpy.ndarray | None]]:
        return Examples, (self.folder, self._chosen)

    def __len__(self) -> int:
        return len(self._table) if self._chosen is None else len(self._chosen)

    def __getitem__(self, i: int) -> Example:  # type: ignore[override]  # `split` is for parts
        return self.piece(i, 0, None)

    def piece(self, i: int, start: int, end: int | None) -> Example:
        """Values start .. end - 1 of each field of example `i`; to the last one if `end` is None.

        No field may have fewer.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self)} examples, got the number {i}")
        i %= len(self)
        row = i if self._chosen is None else self._chosen[i]
        begins = self._table[row - 1, 1:].tolist() if row else [0] * len(self.fields)
        ends = self._table[row, 1:].tolist()
        return {
            name: array.read(begin + start, last if end is None else begin + end)
            for name, array, begin, last in zip(self.fields, self._arrays, begins, ends)
        }

    @property
    def lengths(self) -> numpy.ndarray:
        """(examples,) int64: how many values each example has in the first field."""
        return self.sizes[:, 0]

    @property
    def records(self) -> numpy.ndarray:
        """(examples,) int64: the number of the record that each example was made of."""
        records = self._table[:, 0]
        return records if self._chosen is None else records[self._chosen]

    @functools.cached_property
    def sizes(self) -> numpy.ndarray:
        """(examples, fields) int64: how many values each example has in each field."""
        ends = self._table[:, 1:]
        sizes = numpy.diff(ends, axis=0, prepend=numpy.zeros_like(ends[:1]))
        return sizes if self._chosen is None else sizes[self._chosen]

    def split(self, fraction: float) -> tuple[Examples, Examples]:
        """Those to train on, and those of `fraction` of the records, to validate.

        The latter's records stand at even distances. All examples of a record go together.

        Raises:
            ValueError: `fraction` is not in (0, 1), or leaves nothing for one of the two.
        """
        check_within("fraction", fraction, "(0, 1)")
        chosen = numpy.arange(len(self._table)) if self._chosen is None else self._chosen
        _, record = numpy.unique(self._table[chosen, 0], return_inverse=True)
        held_out = numpy.floor((record + 1) * fraction) > numpy.floor(record * fraction)
        if not held_out.any():
            raise ValueError(
                f"{record.max() + 1} records are too few to keep {fraction:g} of them for "
                "validation: give more, or other files to validate on"
            )
        return Examples(self.folder, chosen[~held_out]), Examples(self.folder, chosen[held_out])


class _Array:
    """A file of numbers, mapped into memory, with a checksum of each block."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        dtype, count = DTYPES[about["dtype"]], about["count"]
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise _damaged(path, f"it has {size} bytes of {count * dtype.itemsize}")
        self.values: numpy.ndarray = numpy.empty(0, dtype)  # an empty file cannot be mapped
        if count:
            self.values = numpy.asarray(numpy.memmap(path, dtype, mode="r"))
        self._checksums = about["checksums"]
        self._checked: numpy.ndarray = numpy.zeros(len(self._checksums), dtype=bool)

    def read(self, start: int, end: int) -> numpy.ndarray:
        """A copy: int64, so that no arithmetic wraps, whichever dtype the corpus allowed."""
        self.check(start, end)
        return self.values[start:end].astype(numpy.int64)

    def check(self, start: int, end: int) -> None:
        """Compare the blocks in which these values lie with their checksums, each block once."""
        itemsize = self.values.itemsize
        blocks = slice(start * itemsize // BLOCK, -(-end * itemsize // BLOCK))
        if self._checked[blocks].all():
            return
        contents: Any = self.values.view(numpy.uint8)
        for block in range(blocks.start, blocks.stop):
            if not self._checked[block]:
                found = zlib.crc32(contents[block * BLOCK : (block + 1) * BLOCK])
                if found != self._checksums[block]:
                    raise _damaged(self.path, f"the checksum of block {block} differs")
                self._checked[block] = True


def checksums(path: Path) -> list[int]:
    """The CRC-32 of each block of a file."""
    with open(path, "rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


def _files_of(folder: Path) -> dict[str, Any]:
    """The index's entry for each file: dtype, count, checksums."""
    path = folder / INDEX
    try:
        files: dict[str, Any] = read_json(path)["files"]
        for name, about in files.items():
            dtype, count, sums = (about[key] for key in ("dtype", "count", "checksums"))
            size = DTYPES[dtype].itemsize * check_integer("count", count, at_least=0)
            if not name.isidentifier() or type(sums) is not list or len(sums) != -(-size // BLOCK):
                raise ValueError(f"the entry of {name!r} fits no file")
        files[TABLE]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    return files


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {reason}; delete the folder {path.parent} to have it written again"
    )
