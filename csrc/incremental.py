"""Compiles the sources of a library in parallel, and only what has changed: setup.py and the tests'
emulator (tests/emulator/library.py) build with it, by nvcc and by g++.

An object is up to date if its command, and the contents of its source and of every header that it
read, are what they were. The record of that lies beside it.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Say = Callable[[str], None]


class BuildError(RuntimeError):
    """A source does not compile, or a library does not link; the message holds the output."""


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_all(
    compiler: Sequence[str],
    sources: Sequence[str],
    root: Path,
    folder: Path,
    jobs: int,
    say: Say,
    version: str = "",
) -> list[Path]:
    """The objects of `sources`, which are relative to `root`, in `folder`.

    Args:
        compiler: the program and its options; the source and the output are added.
        jobs: processes at once.
        say: told of each file that was compiled, and of the compiler's warnings.
        version: of what no header shows; another one compiles all anew.

    Raises:
        BuildError: sources do not compile. The others have been, and are up to date.
    """
    objects = {source: folder / f"{source}.o" for source in sources}
    hashes: dict[Path, str] = {}

    def key(source: str) -> str:
        read = [source, *_read(objects[source])]
        for path in {root / name for name in read} - hashes.keys():
            hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        parts = [*compiler, version, *(f"{name} {hashes[root / name]}" for name in read)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def up_to_date(source: str) -> bool:
        output = objects[source]
        try:
            return output.exists() and _record(output).read_text() == key(source)
        except FileNotFoundError:
            return False

    def compile_one(source: str) -> str:
        """What the compiler printed."""
        output = objects[source]
        output.parent.mkdir(parents=True, exist_ok=True)
        _record(output).unlink(missing_ok=True)
        options = ["-MMD", "-MF", str(output.with_suffix(".d")), "-c", source, "-o", str(output)]
        began = time.time()
        printed = _run([*compiler, *options], root, f"{source} does not compile")
        # What was written to meanwhile may not be what the compiler saw: next time again.
        if all((root / name).stat().st_mtime < began for name in [source, *_read(output)]):
            _record(output).write_text(key(source))
        return printed

    stale = [source for source in sources if not up_to_date(source)]
    hashes.clear()
    errors = []
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        running = {pool.submit(compile_one, source): source for source in stale}
        for done, job in enumerate(concurrent.futures.as_completed(running), 1):
            try:
                printed = job.result()
            except BuildError as error:
                errors.append(str(error))
                continue
            say(f"compiled {running[job]} ({done} of {len(stale)})")
            if printed.strip():
                say(printed.rstrip())
    if errors:
        raise BuildError("\n".join(errors))
    return list(objects.values())


def link(command: Sequence[str], objects: Sequence[Path], root: Path, output: Path) -> None:
    """Link if an object, their list or the command changed. Processes keep an old library.

    Raises:
        BuildError: the linker refuses.
    """
    inputs = [f"{path} {path.stat().st_mtime_ns}" for path in objects]
    wanted = "\n".join([*command, *inputs])
    record = _record(output)
    if output.exists() and record.exists() and record.read_text() == wanted:
        return
    record.unlink(missing_ok=True)
    fresh = output.with_suffix(".new")
    _run([*command, *map(str, objects), "-o", str(fresh)], root, f"{output.name} does not link")
    fresh.replace(output)
    record.write_text(wanted)


def _run(command: Sequence[str], root: Path, failure: str) -> str:
    """What a command printed; raises BuildError, which begins with `failure`."""
    try:
        run = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise BuildError(f"{failure}: {command[0]} cannot be run: {error.strerror}") from error
    printed = run.stdout.decode(errors="replace")
    if run.returncode:
        raise BuildError(f"{failure}: {command[0]} exited with {run.returncode}\n{printed}")
    return printed


def _record(output: Path) -> Path:
    return output.with_suffix(".record")


def _read(output: Path) -> list[str]:
    """The files that the compiler read for an object, but for those of the system and of torch."""
    try:
        rule = output.with_suffix(".d").read_text().replace("\\\n", " ")
    except FileNotFoundError:
        return []
    return rule.partition(": ")[2].split()  # a colon may stand in the folder's name too
