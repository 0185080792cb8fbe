"""One file to records: text, lines of JSON, Parquet.

Each record comes with its place, which errors name. A file is read in pieces, but for a text that
is one document, and whatever is wrong with it raises: nothing is skipped but blank lines.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from fastattn.training.contract import Record
from fastattn.training.optional import require

Documents = Literal["file", "line", "paragraph"]
PARQUET_ROWS = 1024  # that are in memory at once
# Bytes of a record that was compressed: a small file may hold one of any size.
LONGEST_LINE = 2**28


class Sourced(NamedTuple):
    """A record and its place, as "reviews.jsonl:17"."""

    place: str
    record: Record


def read_text(path: Path, documents: Documents) -> Iterator[Sourced]:
    """{"text": ...} of a file in UTF-8: of all of it, of each line, or of each paragraph.

    Paragraphs are what blank lines separate. A byte-order mark is dropped, and "\\r\\n" is "\\n".
    """
    if documents == "file":
        text = "".join(line for _, line in numbered_lines(path, documents))
        if text.strip():
            yield Sourced(str(path), {"text": text})
    elif documents == "line":
        for number, line in numbered_lines(path):
            if line.strip():
                yield Sourced(f"{path}:{number}", {"text": line.removesuffix("\n")})
    else:
        for full, group in groupby(
            numbered_lines(path, documents), key=lambda numbered: bool(numbered[1].strip())
        ):
            if full:
                lines = list(group)
                text = "".join(line for _, line in lines).removesuffix("\n")
                yield Sourced(f"{path}:{lines[0][0]}", {"text": text})


def read_json_lines(path: Path, documents: Documents) -> Iterator[Sourced]:
    """The object in each line."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{place}: each line must be one whole object of JSON: {error}; is the file cut "
                "off, or one object over several lines?"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{place}: each line must be one whole object of JSON, as "
                f'{{"text": "..."}}, got {type(record).__name__}'
            )
        yield Sourced(place, record)


def read_parquet(path: Path, documents: Documents) -> Iterator[Sourced]:
    """The rows, by the names of the columns; needs the package `pyarrow`."""
    parquet = require("pyarrow.parquet", "parquet", f"reading {path}")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield Sourced(f"{path}: row {number}", record)
    except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(
            f"{path}: no whole Parquet file, or a damaged one, after row {number}: {error}"
        ) from error


READERS: dict[str, Callable[[Path, Documents], Iterator[Sourced]]] = {
    ".txt": read_text,
    ".txt.gz": read_text,
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json": read_json_lines,
    ".json.gz": read_json_lines,
    ".parquet": read_parquet,
}


def reader_of(path: Path) -> Callable[[Path, Documents], Iterator[Sourced]]:
    """The reader of a file, by the end of its name.

    Raises:
        ValueError: there is none.
    """
    for end, reader in READERS.items():
        if path.name.lower().endswith(end):
            return reader
    raise ValueError(
        f"{path}: the name of a file of data must end with one of {', '.join(READERS)}; a pattern "
        'such as "folder/**/*.txt" leaves out what else is in a folder'
    )


def numbered_lines(path: Path, documents: Documents = "line") -> Iterator[tuple[int, str]]:
    """The lines of a text in UTF-8 with their numbers, from 1, and with their "\\n".

    Raises:
        ValueError: a line is damaged, cut off, binary or not in UTF-8; or a record of a compressed
            file, as `documents` has them, is too long.
    """
    number, packed = 0, path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            whole = 0
            while line := file.readline(LONGEST_LINE if packed else -1):
                number += 1
                goes_on = documents == "file" or (documents == "paragraph" and line.strip())
                whole = len(line) + (whole if goes_on else 0)
                if packed and whole >= LONGEST_LINE:
                    raise ValueError(
                        f"{path}:{number}: a record of a compressed file may have at most "
                        f"{LONGEST_LINE} bytes: unpack the file, if you trust it"
                    )
                yield number, _decoded(line, f"{path}:{number}", number == 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: damaged or cut off after line {number}, gzip says: {error}"
        ) from error


def _decoded(line: bytes, place: str, is_first: bool) -> str:
    if is_first:
        line = line.removeprefix(codecs.BOM_UTF8)
    if b"\0" in line:
        raise ValueError(
            f"{place}: holds a zero byte, so it is binary or in UTF-16; a text must be in UTF-8 "
            "(iconv -f UTF-16 -t UTF-8 converts)"
        )
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: is not in UTF-8: byte 0x{line[error.start]:02x} at column "
            f"{error.start + 1} ({error.reason}); iconv converts from other encodings"
        ) from error
    return text[:-2] + "\n" if text.endswith("\r\n") else text
