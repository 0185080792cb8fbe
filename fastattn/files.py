"""Files and folders that are there whole or not at all, by paths that may begin with "~"."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LARGEST_TEXT = 2**28  # bytes of a config, an index or a tokenizer; the largest known have 2**25
DEEPEST = 64  # objects and lists in one another


def local_path(name: str, path: str | os.PathLike[str]) -> Path:
    """`path` with "~" as the home folder; `name` is the argument's, for errors.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(path).__name__}")
    text = os.fspath(path)
    if not text:
        raise ValueError(f'{name} is an empty path: give "." for the current folder')
    return Path(os.path.expanduser(text))


def read_whole(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """The bytes of a regular file. Links are followed, as the Hugging Face cache is made of them.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is a pipe or a device, which may never end, or has more than `most` bytes.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer does not block
    with open(opened, "rb") as file:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: must be a regular file")
        if status.st_size > most:
            raise ValueError(f"{path}: has {status.st_size} bytes, at most {most} are read")
        return file.read(status.st_size)


def read_json(path: Path, *, finite: bool = True, most: int = LARGEST_TEXT) -> Any:
    """What the JSON in a regular file says; errors of `read_whole` and `parsed_json` name it."""
    content = read_whole(path, most)
    try:
        return parsed_json(content, finite=finite)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def parsed_json(content: bytes, *, finite: bool = True) -> Any:
    """What a text in JSON and UTF-8 says, with or without a byte-order mark.

    Refused is what two readers may understand in two ways, and what breaks the code that walks
    through it: a key that is there twice, half of a surrogate pair, more than `DEEPEST`
    objects and lists in one another, and NaN and infinities unless `finite` is False.

    Raises:
        ValueError: it is none.
    """
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(
            text, object_pairs_hook=_once, parse_constant=_not_finite if finite else None
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    check_depth(found)
    return found


def check_depth(value: Any) -> None:
    """Raise ValueError for more than `DEEPEST` dicts and lists in one another."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError(f"it has more than {DEEPEST} objects and lists in one another")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")
    return found


def _not_finite(constant: str) -> Any:
    raise ValueError(f"it has {constant}, which is no number of JSON")


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder, renamed to `path` when the block ends well.

    A block that raises leaves `path` as it was and no temporary file. The folder is made if
    it is missing. The file's mode follows the umask.
    """
    target = local_path("path", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: some writers choose the format by it.
    temporary = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{target.suffix}")
    mode = _touch(temporary)
    try:
        yield temporary
        temporary.chmod(mode)  # the writer may have replaced the file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def folder_written_beside(
    folder: Path, last: str, replaces: Callable[[str], bool]
) -> Iterator[Path]:
    """Yield an empty temporary folder, whose files go to `folder` when the block ends well.

    A new folder appears by one renaming. In a folder that exists, the files take the place of those
    of their names and of those that `replaces` names; all others stay. Whatever raises leaves it as
    it was. Should the process die in between, `last` is missing, which is the first file to go and
    the last to come. The files' modes follow the umask.
    """
    exists = folder.is_dir()
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    beside = place / f".saving-{secrets.token_hex(4)}"
    beside.mkdir()
    try:
        yield beside
        probe = beside / f".mode-{secrets.token_hex(4)}"
        mode = _touch(probe)
        probe.unlink()
        for file in beside.iterdir():
            file.chmod(mode)  # a writer may have its own idea
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        if exists:
            _exchange(beside, folder, last, replaces)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _exchange(beside: Path, folder: Path, last: str, replaces: Callable[[str], bool]) -> None:
    """Move the files of `beside` into `folder` and the old ones out; undone if that fails."""
    new = sorted(file.name for file in beside.iterdir())
    old = sorted(f.name for f in folder.iterdir() if f.name in new or replaces(f.name))
    former = beside / "former"
    former.mkdir()
    moves = [(folder / name, former / name) for name in sorted(old, key=lambda name: name != last)]
    moves += [(beside / name, folder / name) for name in sorted(new, key=lambda name: name == last)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _touch(path: Path) -> int:
    """Make an empty file, and return the mode that the umask gave it."""
    path.touch(exist_ok=False)
    return path.stat().st_mode & 0o777
