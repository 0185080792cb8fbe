"""Folders that outlive a crash: on the disk before they have their name, with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastattn.files import read_json
from fastattn.training.distributed.processes import Processes

Entry = dict[str, int | str]  # the size and the SHA-256 of a file
MANIFEST = "manifest.json"
READ = 2**20  # bytes at a time


def seal(folder: Path, processes: Processes) -> None:
    """Make all files of `folder` durable, then write the manifest of their sizes and hashes.

    Several processes, all of which must call it, share the work; the first writes the manifest.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = processes.gathered({path.relative_to(folder).as_posix(): path for path in found})[0]
    own = list(files)[processes.rank :: processes.count]

    def hashed() -> dict[str, Entry]:
        for name in own:
            _sync(files[name])
        return _entries(folder, own)

    def written() -> None:
        if not processes.leads:
            return
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        _sync(manifest)
        for inner in {folder, *(file.parent for file in files.values())}:
            _sync(inner)

    parts = processes.gathered(processes.together(hashed))
    entries = {name: entry for part in parts for name, entry in part.items()}
    processes.together(written)


def rename(source: Path, target: Path) -> None:
    """Give a sealed folder its name, durably."""
    os.rename(source, target)
    _sync(target.parent)


def damage(folder: Path, processes: Processes) -> str | None:
    """How `folder` differs from what was sealed, with the file's name; None if it does not.

    All processes must call it: each looks at some of the files, and all have the answer.
    """
    found = processes.gathered(_damage(folder, processes.rank, processes.count))
    return next((words for words in found if words is not None), None)


def _damage(folder: Path, rank: int, count: int) -> str | None:
    try:
        sealed = read_json(folder / MANIFEST)
        for name, entry in sealed.items():
            if ".." in Path(name).parts or Path(name).is_absolute():
                return f"{MANIFEST} names {name!r}, which is not in the folder"
            size = (folder / name).stat().st_size
            if not (folder / name).is_file():
                return f"{name} is no file"
            if size != entry["size"]:
                return f"{name} has {size} bytes and had {entry['size']}"
        for name, entry in _entries(folder, list(sealed)[rank::count]).items():
            if entry != sealed[name]:
                return f"{name} has other bytes than were written (SHA-256)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def _entries(folder: Path, names: list[str]) -> dict[str, Entry]:
    with ThreadPoolExecutor() as pool:  # a hash lets other threads run
        return dict(zip(names, pool.map(_entry, (folder / name for name in names))))


def _entry(file: Path) -> Entry:
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as opened:
        while piece := opened.read(READ):
            digest.update(piece)
            size += len(piece)
    return {"size": size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
