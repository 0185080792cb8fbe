"""Files and folders that are there whole or not at all, by paths that may begin with "~"."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def local_path(name: str, path: str | os.PathLike[str]) -> Path:
    """`path` with "~" as the home folder; `name` is the argument's, for errors.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(path).__name__}")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path in text, got {text!r}: use os.fsdecode")
    if not text:
        raise ValueError(f'{name} is an empty path: give "." for the current folder')
    return Path(os.path.expanduser(text))


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
