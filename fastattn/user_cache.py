"""The user's cache folder, and the state of the code that what lies in it is about."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from fastattn import extension


def folder(name: str) -> Path | None:
    """A folder for one kind of file, None where the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The standard wants a relative path to be ignored.
    cache = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(cache, "fastattn", name) if os.path.isabs(cache) else None


def file(name: str, about: str, prefix: str = "") -> Path | None:
    """The file about something in such a folder."""
    digest = hashlib.sha256(about.encode()).hexdigest()[:32]
    return None if (place := folder(name)) is None else place / f"{prefix}{digest}.json"


@functools.cache
def sources() -> str:
    """A hash of the ops' code: kernels, launchers and tables of tiles."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "ops").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def library() -> str:
    """A hash of the built CUDA C++ extension, "" where there is none."""
    file = extension.file()
    return "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
