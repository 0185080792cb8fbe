"""The lengths that a GGUF file says, compared with the file's own before anything is made of them.

The package `gguf` takes them at their word: an array of 2^60 numbers in a file of 50 bytes keeps it
busy until memory is full. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

STRING, ARRAY = 8, 9
# The types of values -> their bytes.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MOST_DIMENSIONS = 4
# Elements of all arrays: `gguf` makes an object of each. A vocabulary of 2^18 has a million.
MOST_ELEMENTS = 2**22


def check_lengths(path: Path) -> None:
    """Raise ValueError unless all lengths in the metadata of a file fit into the file."""
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        _Walk(file).whole()


class _Walk:
    """A place in the file, which moves on."""

    def __init__(self, file: mmap.mmap) -> None:
        self._file, self._place, self._elements = file, 0, 0

    def whole(self) -> None:
        magic, version, tensors, pairs = struct.unpack("<4sIQQ", self._take(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}; GGUF 2 and 3 are read")
        for _ in range(self._fitting(pairs, 13)):
            self._string()
            self._value(self._number("<I"))
        for _ in range(self._fitting(tensors, 24)):
            self._string()
            if (dimensions := self._number("<I")) > MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            self._take(8 * dimensions + 12)

    def _value(self, kind: int) -> None:
        if kind == STRING:
            self._string()
        elif kind != ARRAY:
            self._take(self._size(kind))
        else:
            kind, count = self._number("<I"), self._number("<Q")
            if kind == ARRAY:
                raise ValueError("an array of arrays is not read")
            size = 8 if kind == STRING else self._size(kind)
            self._elements += self._fitting(count, size)
            if self._elements > MOST_ELEMENTS:
                raise ValueError(f"its arrays have more than {MOST_ELEMENTS} elements")
            for _ in range(count if kind == STRING else 0):
                self._string()
            self._take(0 if kind == STRING else count * size)

    def _string(self) -> None:
        self._take(self._number("<Q"))

    def _size(self, kind: int) -> int:
        if kind not in SIZES:
            raise ValueError(f"a value has the type {kind}, which GGUF does not have")
        return SIZES[kind]

    def _number(self, format: str) -> int:
        (number,) = struct.unpack(format, self._take(struct.calcsize(format)))
        return int(number)

    def _fitting(self, count: int, size: int) -> int:
        """``count``, if so many things of at least ``size`` bytes are left."""
        if count * size > len(self._file) - self._place:
            raise ValueError(f"it says that {count} things come, and ends before")
        return count

    def _take(self, size: int) -> bytes:
        self._fitting(size, 1)
        self._place += size
        return self._file[self._place - size : self._place]
