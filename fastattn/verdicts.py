"""The verdicts of proofs (proving.py) in the user's cache folder, a file a family.

A file's name stands for all that its verdict depends on: the family, the device, its driver, torch,
the compiler and the code of the kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastattn import extension, files, measured, user_cache

try:
    import fcntl
except ImportError:  # not on Windows: two processes may prove the same, with the same verdict
    fcntl = None  # type: ignore[assignment]

RUNNING, PASSED, FAILED = "running", "passed", "failed"
FOLDER = "proofs"
LARGEST, LONGEST = 2**14, 1000  # bytes of a file, characters of its figures


class Verdict(NamedTuple):
    """Whether a family passed, and the figures, in a line."""

    passed: bool
    told: str


class Subject(NamedTuple):
    """What a verdict is about."""

    op: str
    backend: str
    family: str
    device: torch.device


def path_of(about: Subject) -> Path | None:
    """The file of a verdict: its name stands for all that the verdict depends on."""
    named = [about.op, about.backend, about.family, environment(about.backend, about.device)]
    return user_cache.file(FOLDER, json.dumps(named), f"{about.op}-{about.backend}-")


def read(path: Path | None) -> tuple[str, str] | None:
    """(how it stands, the figures) of a file, None if there is none that can be read."""
    if path is None:
        return None
    try:
        note = files.read_json(path, most=LARGEST)
        stands, told = note["verdict"], note["told"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = stands in (RUNNING, PASSED, FAILED) and isinstance(told, str) and told == _line(told)
    return (stands, told) if known else None


def failures(device: torch.device) -> Iterator[tuple[str, str]]:
    """(the family in words, the figures) of each that failed on `device` as it is now."""
    place = user_cache.folder(FOLDER)
    named = measured.devices(device) != (device.type,)  # a CPU has no kernel to choose
    for path in sorted(place.glob("*.json")) if named and place is not None else ():
        try:
            note = files.read_json(path, most=LARGEST)
            about = Subject(note["op"], note["backend"], note["family"], device)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # Whatever the file says of itself, its name says what it is about.
        if all(isinstance(x, str) for x in about[:3]) and path_of(about) == path:
            with locked(path) as held:
                verdict = left(path) if held else None
            if verdict is not None and not verdict.passed:
                yield _line(f"{about.backend} {about.op}, {about.family}"), verdict.told


def _line(text: str) -> str:
    """A text as it may be printed: one line of characters that show, and not too long."""
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST]


def left(path: Path | None) -> Verdict | None:
    """The verdict that another process left, for the one that has the family to itself."""
    note = read(path)
    if note is None:
        return None
    if note[0] == RUNNING:
        return Verdict(False, "the process ended while it ran, which a fault of the device does")
    return Verdict(note[0] == PASSED, note[1])


def write(path: Path | None, about: Subject, stands: str, told: str) -> None:
    """Note a verdict, whole or not at all; where nothing can be written, this process knows it."""
    if path is None:
        return
    note = {
        "verdict": stands, "told": _line(told), "op": about.op, "backend": about.backend,
        "family": about.family, **environment(about.backend, about.device),
    }  # fmt: skip
    with contextlib.suppress(OSError):
        files.write_text(path, json.dumps(note, indent=1) + "\n")


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[bool]:
    """Whether no other process proves this family until the block ends, or dies."""
    with contextlib.ExitStack() as stack:
        free = True
        if path is not None and fcntl is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:  # nothing can be written, or the file system knows no locks
                pass
        yield free


@functools.cache
def environment(backend: str, device: torch.device) -> dict[str, str]:
    """All but the family that a verdict depends on, by name."""
    found = {
        "device": " ".join(measured.devices(device)),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
    }
    if backend == "cuda":
        found["extension"] = user_cache.library()
    else:
        found["triton"] = _version("triton")
        names = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_INTERPRET")
        found["settings"] = " ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    found["sources"] = user_cache.sources()
    return found


def _driver() -> str:
    """The version of the driver, as it writes it."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:  # not Linux, or a container without it
        return ".".join(map(str, extension.driver()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
