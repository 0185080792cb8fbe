"""Files, folders and patterns to a stream of records."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from fastattn.files import local_path
from fastattn.nn.checks import check_choice
from fastattn.training.data.formats import Documents, Sourced, reader_of

AnyPath = str | os.PathLike[str]


def find_files(paths: AnyPath | Sequence[AnyPath]) -> list[Path]:
    """The files that `paths` name, in their order.

    Args:
        paths: files, folders (all files in them and below, sorted; links to folders are followed)
            and patterns ("texts/**/*.txt", sorted). Hidden files, whose names begin with ".", must
            be named themselves.

    Raises:
        FileNotFoundError: nothing is there, in the folder, or fits the pattern.
        ValueError: a file of an unknown format, one that is found twice, or no regular file.
    """
    each = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    found: dict[Path, Path] = {}
    for path in each:
        before = len(found)
        for file in _candidates(local_path("paths", path)):
            if not file.is_file():
                raise ValueError(f"{file}: is no regular file")
            reader_of(file)
            other = found.setdefault(file.resolve(), file)
            if other is not file:
                raise ValueError(f"paths name a file twice: as {other} and as {file}")
        if len(found) == before:
            raise FileNotFoundError(f"{path}: no file is there, or only hidden ones")
    if not found:
        raise ValueError("paths is empty: name a file, a folder or a pattern")
    return list(found.values())


def read_records(
    paths: AnyPath | Sequence[AnyPath], documents: Documents = "file"
) -> Iterator[Sourced]:
    """The records of files, one after the other, each with its place.

    A line of .jsonl (or .json, .jsonl.gz, .json.gz) is a record, which must be an object, and so is
    a row of .parquet. A .txt (or .txt.gz) has records with the one field "text", in UTF-8.

    Args:
        paths: see `find_files`.
        documents: what is a record of a text: all of the "file", each "line" or each "paragraph"
            (blank lines are between them).

    Raises:
        FileNotFoundError, ValueError: see `find_files`; or `documents` is unknown. Later, for what
            is damaged, cut off, binary, not in UTF-8, no object or empty, a ValueError whose
            message begins with the place.
        ImportError: a .parquet file, without the package `pyarrow`.
    """
    check_choice("documents", documents, get_args(Documents))
    return _records(find_files(paths), documents)


def _records(files: Sequence[Path], documents: Documents) -> Iterator[Sourced]:
    for file in files:
        empty = True
        for sourced in reader_of(file)(file, documents):
            empty = False
            yield sourced
        if empty:
            raise ValueError(f"{file}: is empty, or blank")


def _candidates(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from _walk(path)
    elif path.exists():
        yield path
    elif any(character in str(path) for character in "*?["):
        names = sorted(glob.glob(str(path), recursive=True))
        yield from (Path(name) for name in names if not os.path.isdir(name))
    else:
        raise FileNotFoundError(f"{path}: there is no such file or folder")


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links in a circle name a folder without end
            raise ValueError(f"{place}: links lead to this folder twice")
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))
