"""Folders that outlive a crash: on the disk before they have their name, with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastattn.files import read_json

MANIFEST = "manifest.json"
READ = 2**20  # bytes at a time


def seal(folder: Path) -> None:
    """Make all files of `folder` durable, then write the manifest of their sizes and hashes."""
    files = _files(folder)
    for file in files.values():
        _sync(file)
    with ThreadPoolExecutor() as pool:  # a hash lets other threads run
        entries = dict(zip(files, pool.map(_entry, files.values())))
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    _sync(manifest)
    for inner in {folder, *(file.parent for file in files.values())}:
        _sync(inner)


def rename(source: Path, target: Path) -> None:
    """Give a sealed folder its name, durably."""
    os.rename(source, target)
    _sync(target.parent)


def damage(folder: Path) -> str | None:
    """How `folder` differs from what was sealed, with the file's name; None if it does not."""
    try:
        entries = read_json(folder / MANIFEST)
        for name, entry in entries.items():
            if ".." in Path(name).parts or not (folder / name).is_relative_to(folder):
                return f"{MANIFEST} names {name!r}, which is not in the folder"
            size = (folder / name).stat().st_size
            if not (folder / name).is_file():
                return f"{name} is no file"
            if size != entry["size"]:
                return f"{name} has {size} bytes and had {entry['size']}"
        with ThreadPoolExecutor() as pool:
            now = pool.map(_entry, (folder / name for name in entries))
            for (name, entry), found in zip(entries.items(), now):
                if found != entry:
                    return f"{name} has other bytes than were written (SHA-256)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def _files(folder: Path) -> dict[str, Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files}


def _entry(file: Path) -> dict[str, int | str]:
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
